"""Encodes scenes into shards of latents, as `anyflow-precompute` encodes files of videos.

The scenes are rendered and encoded in batches, without a detour through mp4 files; the shards are
the same. Its videos have 33 frames. A recipe with fewer takes the first of them: Wan's VAE is
causal in time, so they are the latents of the shorter video.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from anyflow_deploy.bundle.atomic_io import write_bytes_atomically
from anyflow_deploy.models import TEXT_TOKENS
from anyflow_deploy.pipelines.vae import latent_statistics
from anyflow_deploy.progress import Progress
from anyflow_deploy.training.data.manifest import MARKER, DatasetManifest, shard_name
from anyflow_deploy.training.data.precompute import trim_padding
from anyflow_deploy.training.data.samples import CAPTION, TENSORS
from anyflow_deploy.training.data.shard_source import NEGATIVE
from anyflow_deploy.training.shapes.scenes import make_scene
from anyflow_deploy.training.shapes.vae import PICTURE, make_clips

FRAMES = 33
_BATCH = 10


@torch.no_grad()
def write_shards(
    pipeline: Any,
    folder: Path,
    seed: int,
    counts: tuple[int, int],
    progress: Progress,
    compute: torch.dtype,
) -> None:
    """Write the shards that are not there yet.

    Args:
        pipeline: of diffusers, with VAE, text encoder and tokenizer.
        folder: of the shards.
        seed: of the scenes.
        counts: scenes of the data set, and of one shard; the first is a multiple of the second,
            which is one of 10.
        progress: shows the scenes.
        compute: type of the VAE's convolutions.
    """
    folder.mkdir(parents=True, exist_ok=True)
    count, shard_scenes = counts
    shards = count // shard_scenes
    vae = pipeline.vae
    height, width = (side // vae.config.scale_factor_spatial for side in PICTURE)
    shape = ((FRAMES - 1) // vae.config.scale_factor_temporal + 1, vae.config.z_dim, height, width)
    manifest = DatasetManifest(
        latents=shape,
        tokens=TEXT_TOKENS,
        width=pipeline.text_encoder.config.d_model,
        type="float32",
        encoders="shapes",
        clips=f"shapes-{seed}",
        count=count,
        shards=shards,
        shard_samples=shard_scenes,
    )
    write_bytes_atomically(folder / MARKER, manifest.model_dump_json(indent=1).encode())
    negative = safetensors.torch.save({"text": trim_padding(embed_captions(pipeline, [""])[0])})
    write_bytes_atomically(folder / NEGATIVE, negative)
    with progress.stage("latents", count) as advance:
        for number in range(shards):
            if not (folder / shard_name(number)).is_file():
                scenes = range(number * shard_scenes, (number + 1) * shard_scenes)
                data = _encode_shard(pipeline, seed, scenes, compute)
                write_bytes_atomically(folder / shard_name(number), data)
            advance(shard_scenes)


def _encode_shard(pipeline: Any, seed: int, scenes: range, compute: torch.dtype) -> bytes:
    from webdataset import TarWriter

    memory = io.BytesIO()
    with TarWriter(memory, encoder=False, mtime=0.0, format="PAX_FORMAT") as writer:
        for start in scenes[::_BATCH]:
            captions = [make_scene(seed, start + i).caption for i in range(_BATCH)]
            latents = encode_scenes(pipeline.vae, seed, start, _BATCH, FRAMES, compute)
            texts = [trim_padding(text).clone() for text in embed_captions(pipeline, captions)]
            for i, (latent, text) in enumerate(zip(latents, texts, strict=True)):
                tensors = safetensors.torch.save({"latents": latent.contiguous(), "text": text})
                content = {TENSORS: tensors, CAPTION: captions[i].encode()}
                writer.write({"__key__": f"{start + i:06d}", **content})
    return memory.getvalue()


@torch.no_grad()
def encode_scenes(
    vae: Any,
    seed: int,
    first: int,
    count: int,
    frames: int,
    compute: torch.dtype = torch.float32,
    held_out: bool = False,
) -> Tensor:
    """Encode scenes: float32 (count, F, C, H, W), scaled as the transformer takes them."""
    clips = make_clips(seed, first, count, frames, *PICTURE, held_out)
    with torch.autocast("cpu", torch.bfloat16, enabled=compute == torch.bfloat16):
        latents = vae.encode(clips.to(memory_format=torch.channels_last_3d)).latent_dist.mode()
    mean, std = latent_statistics(vae)
    scaled: Tensor = (latents.float() - mean) / std
    return scaled.transpose(1, 2).contiguous()


def embed_captions(pipeline: Any, captions: list[str]) -> Tensor:
    """Embed captions with a pipeline's own encoder: float32 (captions, 512, D), padded with zeros.

    Args:
        pipeline: of diffusers, with text encoder and tokenizer.
        captions: to embed; "" is the empty prompt.
    """
    embeds, _ = pipeline.encode_prompt(
        captions, do_classifier_free_guidance=False, max_sequence_length=TEXT_TOKENS
    )
    result: Tensor = embeds.float()
    return result
