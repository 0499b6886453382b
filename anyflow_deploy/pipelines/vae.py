"""Latents to pixels and back, with the checkpoint's own Wan VAE.

This is the one place where latents are laid out (B, C, F, H, W), as diffusers' VAE wants them, and
where the per-channel scaling that the transformer works in is undone. Wan's VAE is causal in time:
a latent frame needs the convolutions' features of earlier frames and nothing of later ones.
`StreamingDecoder` keeps those features between calls, so a video decoded in parts equals the same
video decoded whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anyflow_deploy.engines.engine import Array
from anyflow_deploy.errors import AnyFlowError, ShapeError
from anyflow_deploy.shape_ranges import latent_frames, latent_side


@dataclass(frozen=True)
class LoadedVae:
    """A VAE in memory that several decoders and encoders share; `load_vae` makes it."""

    module: Any


def load_vae(pipeline: Path, device: str = "cpu") -> LoadedVae:
    """Load a VAE.

    Args:
        pipeline: folder with vae/.
        device: where PyTorch runs it, "cpu" or "cuda".

    Raises:
        AnyFlowError: another VAE than Wan 2.1's.
    """
    return LoadedVae(_load_module(pipeline).to(device))


def decode_video(pipeline: Path | LoadedVae, latents: Array) -> NDArray[np.uint8]:
    """Decode clean latents to pixels.

    Args:
        pipeline: folder with vae/, or a loaded VAE.
        latents: float32 (B, F, C, H, W).

    Returns:
        uint8 (B, frames, height, width, 3), 0 to 255.
    """
    vae = _load_module(pipeline) if isinstance(pipeline, Path) else pipeline.module
    with torch.no_grad():
        pixels = vae.decode(_unscale(vae, latents), return_dict=False)[0]
    return _uint8_from_pixels(pixels)


class StreamingDecoder:
    """Decodes consecutive parts of one video, each as soon as its latents exist.

        decoder = StreamingDecoder(pipeline)
        for chunk in stream(engine, latents, text, schedule):
            frames = decoder.decode(chunk.latents)

    The work and the memory of a part depend on its own frames only. A decoder serves one video;
    make another for the next.

    Args:
        pipeline: folder with vae/, or a loaded VAE, which several decoders may share.
    """

    def __init__(self, pipeline: Path | LoadedVae) -> None:
        self._vae = load_vae(pipeline).module if isinstance(pipeline, Path) else pipeline.module
        self._vae.clear_cache()  # makes a new list each time
        self._features: list[Any] = self._vae._feat_map
        self._shape: tuple[int, ...] | None = None

    def decode(self, latents: Array) -> NDArray[np.uint8]:
        """Decode the next part of the video to pixels.

        The video's first latent frame gives one frame, every later one four.

        Args:
            latents: clean, float32 (1, f, C, H, W), f at least 1.

        Returns:
            uint8 (frames, height, width, 3), 0 to 255.

        Raises:
            ShapeError: several videos, no latent frame, or another size than the parts before.
        """
        return np.asarray(_uint8_from_pixels(self.decode_pixels(latents))[0], dtype=np.uint8)

    def decode_pixels(self, latents: Array) -> Tensor:
        """Decode the next part to float32 (1, 3, frames, height, width), -1 to 1."""
        self._check(latents.shape)
        vae = self._vae
        parts = []
        with torch.no_grad():
            z = vae.post_quant_conv(_unscale(vae, latents))
            for frame in z.split(1, dim=2):
                first = self._shape is None
                parts.append(
                    vae.decoder(frame, feat_cache=self._features, feat_idx=[0], first_chunk=first)
                )
                self._shape = latents.shape[2:]
        return torch.cat(parts, dim=2).clamp(-1, 1)

    def _check(self, shape: tuple[int, ...]) -> None:
        if len(shape) != 5 or shape[0] != 1 or shape[1] < 1:
            raise ShapeError(
                f"latents have shape {shape}; a streaming decoder takes (1, f, C, H, W) with f at"
                " least 1."
            )
        if self._shape not in (None, shape[2:]):
            raise ShapeError(
                f"latents have (C, H, W) {shape[2:]} and those before had {self._shape}; make"
                " another decoder."
            )


class VideoEncoder:
    """Encodes videos, one after the other, with a VAE that is loaded once.

    Args:
        pipeline: folder with vae/, or a loaded VAE.
        device: where it runs, as torch names it.
    """

    def __init__(self, pipeline: Path | LoadedVae, device: str = "cpu") -> None:
        vae = load_vae(pipeline, device) if isinstance(pipeline, Path) else pipeline
        self._vae = vae.module
        self._device = device

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return int(self._vae.config.z_dim)

    def encode(self, frames: NDArray[np.uint8]) -> Array:
        """Encode a video to clean latents, float32 (1, f, C, H, W): the posterior's mode.

        Args:
            frames: uint8 (4n+1, height, width, 3), 0 to 255.

        Raises:
            ShapeError: another layout, type, number of frames or size.
        """
        if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8:
            raise ShapeError(
                f"frames are {frames.dtype} {frames.shape}; allowed is uint8 (frames, height,"
                " width, 3)."
            )
        self.check(len(frames), *frames.shape[1:3])
        video = (
            torch.from_numpy(frames.copy()).permute(3, 0, 1, 2)[None].to(self._device).float()
            / 127.5
            - 1
        )
        with torch.no_grad():
            z = self._vae.encode(video, return_dict=False)[0].mode().cpu()
        mean, std = latent_statistics(self._vae)
        return np.array(((z - mean) / std).permute(0, 2, 1, 3, 4).numpy(), dtype=np.float32)

    def check(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Check the size of a video, and return its latents' (F, C, H, W).

        Raises:
            ShapeError: the VAE does not take it.
        """
        config = self._vae.config
        sides = [
            latent_side(pixels, config.scale_factor_spatial, 1, axis)
            for axis, pixels in (("height", height), ("width", width))
        ]
        return (
            latent_frames(frames, config.scale_factor_temporal),
            self.channels,
            sides[0],
            sides[1],
        )


def encode_video(pipeline: Path, frames: NDArray[np.uint8]) -> Array:
    """Encode a video, or one frame as a picture, to clean latents: the posterior's mode.

    Args:
        pipeline: folder with vae/.
        frames: uint8 (4n+1, height, width, 3), 0 to 255; height and width multiples of 8.

    Returns:
        float32 (1, n+1, C, height / 8, width / 8).

    Raises:
        ShapeError: another number of frames, layout or size.
    """
    return VideoEncoder(pipeline).encode(frames)


def _load_module(pipeline: Path) -> Any:
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan.from_pretrained(
        pipeline / "vae", dtype=torch.float32, use_safetensors=True
    ).eval()
    if vae.config.patch_size is not None:
        raise AnyFlowError(
            f"{pipeline / 'vae'} is a VAE with patches (Wan 2.2); AnyFlow models use Wan 2.1's."
            " Give --pipeline."
        )
    return vae


def latent_statistics(vae: Any) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each latent channel, (1, C, 1, 1, 1)."""
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std


def _unscale(vae: Any, latents: Array) -> Tensor:
    """Turn the transformer's latents (B, F, C, H, W) into the VAE's, (B, C, F, H, W)."""
    mean, std = latent_statistics(vae)
    return (torch.from_numpy(np.array(latents)).permute(0, 2, 1, 3, 4) * std + mean).to(vae.device)


def _uint8_from_pixels(pixels: Tensor) -> NDArray[np.uint8]:
    """Turn (B, 3, frames, height, width), -1 to 1, into uint8 (B, frames, height, width, 3)."""
    video = (pixels.permute(0, 2, 3, 4, 1).clamp(-1, 1) + 1) * 127.5
    return np.asarray(video.round().to(torch.uint8).cpu().numpy(), dtype=np.uint8)
