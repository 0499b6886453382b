"""Encodes a folder of videos and captions into shards of latents: `anyflow-precompute`.

    OUTPUT/dataset.json            the settings, written first
    OUTPUT/negative.safetensors    the empty prompt's embedding
    OUTPUT/shard-000000.tar        KEY.safetensors (latents, text) and KEY.txt for each
                                   video, in the order of names
    OUTPUT/skipped.jsonl           videos that could not be used, and why

The list of names alone decides which videos a shard holds. A shard gets its name when it is
complete and on the disk; resuming means writing the shards that are missing, whichever process
wrote the others. Shards are the unit of work: each worker has a VAE and a text encoder of its own,
on a GPU of its own where there are several.
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import (
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    as_completed,
)
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch

from anyflow_deploy.bundle.atomic_io import file_sha256, write_bytes_atomically
from anyflow_deploy.bundle.outputs import clear_partial_files
from anyflow_deploy.checkpoints.checkpoint import missing_parts, pipeline_folder
from anyflow_deploy.checkpoints.hub import PIPELINE_FILES, download
from anyflow_deploy.errors import AnyFlowError, CheckpointError
from anyflow_deploy.pipelines.frame_display import BLACK, Color
from anyflow_deploy.pipelines.frame_fit import Fit
from anyflow_deploy.progress import NullProgress, Progress
from anyflow_deploy.training.data.clips import read_clip
from anyflow_deploy.training.data.manifest import MARKER, DatasetManifest, read_manifest, shard_name
from anyflow_deploy.training.data.samples import CAPTION, ENCODER_PARTS, TENSORS, Encoders
from anyflow_deploy.training.data.shard_source import BROKEN_FREE, BROKEN_SHARE, NEGATIVE
from anyflow_deploy.training.data.video_folder import find_videos, read_caption, sample_key

SKIPPED = "skipped.jsonl"


@dataclass(frozen=True)
class PrecomputeJob:
    """The settings of one precomputation.

    Attributes:
        folder: of the videos; NAME.txt beside NAME.mp4 is its caption.
        pipeline: folder with vae/, text_encoder/ and tokenizer/.
        output: folder of the shards.
        size: frames, height and width, in frames and pixels.
        tokens: longest caption.
        type: of the stored numbers, "float32" or "bfloat16".
        shard_samples: videos in a shard.
        workers: processes; 0 for one on each GPU.
        fit: how frames are brought to the size, see `frame_fit`.
        background: behind transparent pixels, and around padded frames.
    """

    folder: Path
    pipeline: Path
    output: Path
    size: tuple[int, int, int]
    tokens: int
    type: str
    shard_samples: int
    workers: int
    fit: Fit = "crop"
    background: Color = BLACK


def find_pipeline(location: str) -> Path:
    """Return the folder of a pipeline.

    `location` is that folder, its transformer, or a Hub id.

    Raises:
        CheckpointError: there is none, or it cannot encode.
    """
    path = Path(location)
    if path.is_dir():
        folder = pipeline_folder(path)
    else:
        folder = download(
            location,
            None,
            PIPELINE_FILES,
            "Give --checkpoint DIR, a pipeline folder on this machine.",
        )
    missing = missing_parts(folder, ENCODER_PARTS)
    if folder is None or missing:
        raise CheckpointError(
            f"{location} lacks {', '.join(missing)}. Give the whole pipeline of Wan2.1 or AnyFlow"
            " in diffusers' layout."
        )
    return folder


def precompute(
    job: PrecomputeJob,
    progress: Progress | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> tuple[int, int]:
    """Write the shards that are not there yet.

    Args:
        job: the settings.
        progress: where the videos are counted.
        tell: called with a line about files that are not read.

    Returns:
        How many videos the folder has, and how many of those encoded now were skipped.

    Raises:
        AnyFlowError: no videos, missing captions, an output with other settings or that cannot be
            written, too many broken videos, or none that can be used.
    """
    progress = progress or NullProgress()
    found = find_videos(job.folder)
    clips = found.videos
    if found.others:
        tell(found.describe_others())
    encoders = Encoders(job.pipeline, _device(0))
    manifest = DatasetManifest(
        latents=encoders.vae.check(*job.size),
        tokens=job.tokens,
        width=encoders.prompts.width,
        type=job.type,
        encoders=_encoders_digest(job.pipeline),
        clips=_clips_digest(job.folder, clips),
        count=len(clips),
        shards=-(-len(clips) // job.shard_samples),
        shard_samples=job.shard_samples,
        fit=job.fit,
        background=job.background,
    )
    _claim_output(job.output, manifest)
    if not (job.output / NEGATIVE).is_file():
        text = torch.from_numpy(encoders.prompts.encode_empty(job.tokens)[0])
        data = safetensors.torch.save({"text": _to_storage_type(trim_padding(text), job.type)})
        with _writing(job.output):
            write_bytes_atomically(job.output / NEGATIVE, data)
    missing_shards = [
        n for n in range(manifest.shards) if not (job.output / shard_name(n)).is_file()
    ]
    skipped_count = 0
    tried_count = 0
    workers = max(1, job.workers or torch.cuda.device_count())
    with progress.stage("videos", len(clips)) as advance, _pool(workers, job, encoders) as pool:
        parts = {
            n: clips[n * job.shard_samples : (n + 1) * job.shard_samples]
            for n in range(manifest.shards)
        }
        advance(sum(len(parts[n]) for n in parts if n not in set(missing_shards)))
        futures = {pool.submit(_write_shard, job, n, parts[n]): n for n in missing_shards}
        try:
            for future in as_completed(futures):
                skipped_lines = _shard_result(future)
                skipped_count = skipped_count + len(skipped_lines)
                tried_count = tried_count + len(parts[futures[future]])
                _append_skipped(job.output, skipped_lines)
                if skipped_count > BROKEN_FREE + BROKEN_SHARE * tried_count:
                    raise AnyFlowError(
                        f"{skipped_count} of {tried_count} videos cannot be used, too many to"
                        f" continue: {skipped_lines[-1]}. {job.output / SKIPPED} lists all. Repair"
                        " or remove them, and make the shards in another --output."
                    )
                advance(len(parts[futures[future]]))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if skipped_count == len(clips):  # shards without a sample are not worth keeping
        for number in missing_shards:
            (job.output / shard_name(number)).unlink()
        raise AnyFlowError(
            f"none of the {len(clips)} videos can be used: {skipped_lines[-1]}. {job.output}"
            f"/{SKIPPED} lists all. Repair or replace them."
        )
    return len(clips), skipped_count


@contextmanager
def _writing(output: Path) -> Iterator[None]:
    """Within it, a file system that refuses is a reason with a way on."""
    try:
        yield
    except OSError as error:
        raise AnyFlowError(
            f"{output} cannot be written: {error.strerror or error}. Make room or mend it; the same"
            " command resumes."
        ) from None


def _claim_output(output: Path, manifest: DatasetManifest) -> None:
    """Create the output, or check that it belongs to the same settings."""
    if (output / MARKER).exists():
        old = read_manifest(output)
        differences = [
            name
            for name in DatasetManifest.model_fields
            if getattr(old, name) != getattr(manifest, name)
        ]
        if differences:
            raise AnyFlowError(
                f"{output} holds shards of other {', '.join(differences)}. Choose another"
                " --output, or give the same settings."
            )
        clear_partial_files(output)
        return
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise AnyFlowError(f"{output} exists and holds something else. Choose another --output.")
    with _writing(output):
        output.mkdir(parents=True, exist_ok=True)
        write_bytes_atomically(output / MARKER, manifest.model_dump_json(indent=1).encode())


_ENCODERS: Encoders | None = None
"""The encoders of this worker."""


def _pool(workers: int, job: PrecomputeJob, encoders: Encoders) -> Executor:
    """Return the workers: a thread of this process, or several processes.

    Several workers share neither VAE nor GPU.
    """
    if workers == 1:
        return ThreadPoolExecutor(1, initializer=_set_encoders, initargs=(encoders,))
    context = multiprocessing.get_context("spawn")
    numbers = context.Queue()
    for number in range(workers):
        numbers.put(number)
    threads = max(1, (os.cpu_count() or 1) // workers)
    return ProcessPoolExecutor(workers, context, _start_worker, (job.pipeline, numbers, threads))


def _set_encoders(encoders: Encoders) -> None:
    global _ENCODERS
    _ENCODERS = encoders


def _start_worker(pipeline: Path, numbers: multiprocessing.Queue[int], threads: int) -> None:
    torch.set_num_threads(threads)
    _set_encoders(Encoders(pipeline, _device(numbers.get())))


def _device(worker: int) -> str:
    count = torch.cuda.device_count()
    return f"cuda:{worker % count}" if count else "cpu"


def _write_shard(job: PrecomputeJob, number: int, clips: list[Path]) -> list[str]:
    """Write one shard, and return the videos that were skipped, with reasons."""
    from webdataset import TarWriter

    assert _ENCODERS is not None
    skipped_lines: list[str] = []
    memory = io.BytesIO()
    with TarWriter(memory, encoder=False, mtime=0.0, format="PAX_FORMAT") as writer:
        for path in clips:
            try:
                tensors = _encode_clip(job, path, _ENCODERS)
            except (AnyFlowError, OSError, ValueError) as error:
                skipped_lines.append(f"{path.relative_to(job.folder)}: {error}")
                continue
            caption = read_caption(path).encode()
            content = {TENSORS: safetensors.torch.save(tensors), CAPTION: caption}
            writer.write({"__key__": sample_key(job.folder, path), **content})
    with _writing(job.output):
        write_bytes_atomically(job.output / shard_name(number), memory.getvalue())
    return skipped_lines


def _encode_clip(job: PrecomputeJob, path: Path, encoders: Encoders) -> dict[str, torch.Tensor]:
    text = torch.from_numpy(encoders.prompts.encode([read_caption(path)], job.tokens)[0])
    clip = read_clip(path, path.name, *job.size, mode=job.fit, background=job.background)
    latents = torch.from_numpy(encoders.vae.encode(clip)[0])
    if not (torch.isfinite(latents).all() and torch.isfinite(text).all()):
        raise ValueError("the encoders returned numbers that are not finite")
    return {
        "latents": _to_storage_type(latents, job.type),
        "text": _to_storage_type(trim_padding(text), job.type),
    }


def trim_padding(text: torch.Tensor) -> torch.Tensor:
    """Remove the zeros that Wan pads with, which training adds again."""
    token_indices = text.abs().amax(1).nonzero()
    return text[: int(token_indices[-1]) + 1 if len(token_indices) else 1]


def _to_storage_type(tensor: torch.Tensor, kind: str) -> torch.Tensor:
    return tensor.to(getattr(torch, kind)).contiguous()


def _shard_result(future: Future[list[str]]) -> list[str]:
    from concurrent.futures.process import BrokenProcessPool

    try:
        return future.result()
    except BrokenProcessPool:
        raise AnyFlowError(
            "the system ended a worker, most likely because memory ran out. Give fewer --workers;"
            " the same command resumes."
        ) from None


def _append_skipped(output: Path, skipped_lines: list[str]) -> None:
    if skipped_lines:
        with _writing(output), (output / SKIPPED).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in skipped_lines)


def _clips_digest(folder: Path, clips: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in clips:
        size = path.stat().st_size
        digest.update(repr((sample_key(folder, path), size, read_caption(path))).encode())
    return digest.hexdigest()[:32]


def _encoders_digest(pipeline: Path) -> str:
    """Hash the VAE's and text encoder's files: whole small ones, names and sizes of large ones."""
    digest = hashlib.sha256()
    for part in ENCODER_PARTS:
        for path in sorted((pipeline / part).iterdir()):
            size = path.stat().st_size
            digest.update(
                repr((part, path.name, size, file_sha256(path) if size < 64 << 20 else "")).encode()
            )
    return digest.hexdigest()[:32]
