"""Reads one sample of a shard: latents and an embedding, or a video and a caption.

No pickle is ever loaded.

The endings of its files tell what a sample holds:

    KEY.safetensors             tensors `latents` (F, C, H, W) and `text` (L, D), scaled and
                                encoded as for training
    KEY.latents.npy, KEY.text.npy    the same as numpy writes them; arrays of objects,
                                     which are pickles, are refused
    KEY.mp4 (.mkv, .mov)        a video, encoded while training by the pipeline that is trained
    KEY.txt                     the caption; beside latents it is only shown

webdataset's own decoders choose by ending, and `.pyd`, `.pickle` or `.pth` would run a program.
They are not used: bytes come from `tar_index`, and the endings above are all that is decoded.
"""

from __future__ import annotations

import io
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.models import SPATIAL_FACTOR, TEMPORAL_FACTOR
from anyflow_deploy.pipelines.text_encoder import PromptEncoder
from anyflow_deploy.pipelines.vae import VideoEncoder
from anyflow_deploy.training.data.clips import read_clip
from anyflow_deploy.training.data.tar_index import SampleEntry

TENSORS = "safetensors"
LATENTS_NPY = "latents.npy"
TEXT_NPY = "text.npy"
CAPTION = "txt"
VIDEOS = ("mp4", "mkv", "mov")

ENCODER_PARTS = ("vae", "text_encoder", "tokenizer")
"""Folders of a pipeline that encode videos and captions."""


class BrokenSampleError(Exception):
    """One sample cannot be used; others may."""


@dataclass(frozen=True)
class SampleShape:
    """The shapes of a recipe's samples.

    Latents are (F, C, H, W), and text is (L, D), to which shorter texts are padded.
    """

    latents: tuple[int, int, int, int]
    text: tuple[int, int]


@dataclass(frozen=True)
class Sample:
    """One sample: latents float32 (F, C, H, W), text float32 (L, D), and its caption."""

    latents: Tensor
    text: Tensor
    caption: str


class Encoders:
    """VAE and text encoder of a pipeline, for data that consists of videos and captions.

    Attributes:
        lock: held while one of them is used: the VAE keeps features between frames.
    """

    def __init__(self, pipeline: Path, device: str) -> None:
        self.vae = VideoEncoder(pipeline, device)
        self.prompts = PromptEncoder(pipeline, device)
        self.lock = threading.Lock()


def is_precomputed(entry: SampleEntry) -> bool:
    """Tell whether a sample holds latents."""
    return TENSORS in entry.members or LATENTS_NPY in entry.members


def video_ending(entry: SampleEntry) -> str | None:
    """Return the ending of a sample's video, or None."""
    return next((ending for ending in VIDEOS if ending in entry.members), None)


def read_sample(entry: SampleEntry, shape: SampleShape, encoders: Encoders | None) -> Sample:
    """Read and check one sample.

    Args:
        entry: the sample's place in a shard.
        shape: the shape that it has to have.
        encoders: for videos; None where there are none.

    Raises:
        BrokenSampleError: a file is missing or cannot be decoded, or the sample has another shape
            or a number that is not finite.
    """
    try:
        caption = entry.read(CAPTION).decode().strip() if CAPTION in entry.members else ""
        if is_precomputed(entry):
            latents, text = _read_tensors(entry)
        else:
            latents, text = _encode_sample(entry, caption, shape, encoders)
    except (OSError, ValueError, AnyFlowError, SafetensorError) as error:
        raise BrokenSampleError(f"{entry.name}: {error}") from None
    if latents.ndim == len(shape.latents):
        # The VAE is causal in time: the first latents of a video are those of a shorter one
        latents = latents[: shape.latents[0]]
    if tuple(latents.shape) != shape.latents:
        raise BrokenSampleError(
            f"{entry.name}: latents (F, C, H, W) {tuple(latents.shape)}, the recipe has"
            f" {shape.latents}"
        )
    if text.ndim != 2 or text.shape[1] != shape.text[1] or not 1 <= len(text) <= shape.text[0]:
        raise BrokenSampleError(
            f"{entry.name}: text (tokens, channels) {tuple(text.shape)}, the recipe has at most"
            f" {shape.text}"
        )
    if not (torch.isfinite(latents).all() and torch.isfinite(text).all()):
        raise BrokenSampleError(f"{entry.name}: numbers that are not finite")
    padded_text = torch.zeros(shape.text)
    padded_text[: len(text)] = text
    return Sample(latents.float(), padded_text, caption)


def _read_tensors(entry: SampleEntry) -> tuple[Tensor, Tensor]:
    if TENSORS in entry.members:
        tensors = safetensors.torch.load(entry.read(TENSORS))
        missing = [name for name in ("latents", "text") if name not in tensors]
        if missing:
            raise ValueError(f"no tensor {' and no '.join(missing)}")
        latents, text = tensors["latents"], tensors["text"]
    else:
        if TEXT_NPY not in entry.members:
            raise ValueError(f"no {TEXT_NPY}")
        latents, text = (
            torch.from_numpy(_read_array(entry.read(ending))) for ending in (LATENTS_NPY, TEXT_NPY)
        )
    wrong_types = [str(t.dtype) for t in (latents, text) if not t.is_floating_point()]
    if wrong_types:
        raise ValueError(f"numbers of type {wrong_types[0]}")
    return latents.float(), text.float()


def _read_array(data: bytes) -> NDArray[Any]:
    return np.asarray(np.lib.format.read_array(io.BytesIO(data), allow_pickle=False))


def _encode_sample(
    entry: SampleEntry, caption: str, shape: SampleShape, encoders: Encoders | None
) -> tuple[Tensor, Tensor]:
    ending = video_ending(entry)
    if ending is None or encoders is None:
        raise ValueError(f"neither latents nor a video, but {', '.join(sorted(entry.members))}")
    if not caption:
        raise ValueError(f"no caption (.{CAPTION}), or an empty one")
    frames, _, height, width = shape.latents
    size = (TEMPORAL_FACTOR * (frames - 1) + 1, SPATIAL_FACTOR * height, SPATIAL_FACTOR * width)
    pixels = read_clip(entry.read(ending), entry.name, *size)
    with encoders.lock:
        latents = encoders.vae.encode(pixels)[0]
        text = encoders.prompts.encode([caption], shape.text[0])[0]
    return torch.from_numpy(latents), torch.from_numpy(text)
