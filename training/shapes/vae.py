"""Trains the VAE of the `shapes` models: Wan's architecture, small, on videos of moving shapes.

The first steps see single images, as Wan's VAE did, then short clips cut out of the picture, since
a convolution learns the same from them at a fraction of the cost; the last steps see whole
pictures. The latents' mean and deviation are measured afterwards, and stored in the config as Wan's
are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from anyflow_deploy.progress import Progress
from anyflow_deploy.training.shapes.module_trainer import ModuleRun, train_module
from anyflow_deploy.training.shapes.rendering import render_scene
from anyflow_deploy.training.shapes.scenes import make_scene
from anyflow_deploy.training.timestep_sampling import seeded_generator

PICTURE = (64, 96)
"""Height and width of the videos, in pixels."""

CHANNELS = 16
"""Channels of a latent, as many as Wan's."""

KL_WEIGHT = 2e-4
"""Weight of the posterior's divergence per latent number, against the reconstruction's error."""

_IMAGE_SHARE, _WHOLE_SHARE = 0.45, 0.15
"""Share of the steps that see single images (at the start), and whole pictures (at the end)."""


def build_vae(seed: int) -> Any:
    """Build an untrained `AutoencoderKLWan` with 1.5 million parameters."""
    from diffusers import AutoencoderKLWan

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKLWan(base_dim=16, z_dim=CHANNELS, dim_mult=[1, 2, 3, 3], num_res_blocks=1)
        _initialize(vae)
    return vae.requires_grad_(True)


@torch.no_grad()
def _initialize(vae: Any) -> None:
    """Set initial weights with which training starts fast.

    Each frame is computed alone at first, frames are doubled and halved by copying, and latents
    have little noise.
    """
    for name, module in vae.named_modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d):
            is_temporal = isinstance(module, torch.nn.Conv3d)
            weight = module.weight[:, :, -1] if is_temporal else module.weight
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.kaiming_normal_(weight, nonlinearity="linear")
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
            if name.endswith("time_conv"):
                _copy_frames(module.weight)
    vae.quant_conv.weight[CHANNELS:] *= 0.1
    vae.quant_conv.bias[CHANNELS:] = -6.0


def _copy_frames(weight: Tensor) -> None:
    """Make a temporal convolution (O, I, 3, 1, 1) copy its newest frame, once or twice."""
    inputs = weight.shape[1]
    identity = torch.eye(inputs).repeat(weight.shape[0] // inputs, 1)
    weight[:, :, -1, 0, 0] = 0.1 * weight[:, :, -1, 0, 0] + identity


def make_clips(
    seed: int, first: int, count: int, frames: int, height: int, width: int, held_out: bool = False
) -> Tensor:
    """Render scenes as the VAE takes them: float32 (count, 3, frames, height, width), -1 to 1."""
    scenes = (make_scene(seed, first + i, held_out) for i in range(count))
    clips = [render_scene(scene, frames, height, width) for scene in scenes]
    return 2 * torch.stack(clips).permute(0, 4, 1, 2, 3).contiguous() - 1


def training_clips(seed: int, step: int, steps: int) -> Tensor:
    """Return the clips of a step."""
    if step >= (1 - _WHOLE_SHARE) * steps:
        return make_clips(seed, 2 * step, 2, 9, *PICTURE)
    if step < _IMAGE_SHARE * steps:
        return _crop(make_clips(seed, 16 * step, 16, 13, *PICTURE), 2, 1, seed, step)
    return _crop(make_clips(seed, 8 * step, 8, 13, *PICTURE), 1, 5, seed, step)


def _crop(clips: Tensor, times: int, frames: int, seed: int, step: int) -> Tensor:
    """Cut a quarter of the picture out of each clip, so many times, at random places."""
    random = seeded_generator(seed, "vae-crop", step)
    height, width = PICTURE[0] // 2, PICTURE[1] // 2
    crops = []
    for clip in clips:
        for _ in range(times):
            frame, row, column = (
                int(torch.randint(limit + 1, (), generator=random))
                for limit in (clip.shape[1] - frames, height, width)
            )
            crops.append(
                clip[:, frame : frame + frames, row : row + height, column : column + width]
            )
    return torch.stack(crops)


def train_vae(
    vae: Any,
    folder: Path,
    seed: int,
    steps: int,
    progress: Progress,
    compute: torch.dtype,
    statistics_scenes: int = 64,
) -> None:
    """Train a VAE in place, and set its config's latent statistics.

    Args:
        vae: from `build_vae`.
        folder: of the run's checkpoint.
        seed: of the scenes.
        steps: of the optimizer.
        progress: shows the steps.
        compute: type of the convolutions; bfloat16 is only fast on processors that have it.
        statistics_scenes: that latents are measured on, a multiple of 8.
    """
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv3d):
            # Three times as fast
            module.weight.data = module.weight.data.to(memory_format=torch.channels_last_3d)

    def loss_of_step(step: int) -> Tensor:
        clips = training_clips(seed, step, steps).to(memory_format=torch.channels_last_3d)
        random = seeded_generator(seed, "vae-noise", step)
        with torch.autocast("cpu", torch.bfloat16, enabled=compute == torch.bfloat16):
            posterior = vae.encode(clips).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=random)
            video = vae.decode(posterior.mean + posterior.std * noise).sample
        video = video.float()
        error = F.l1_loss(video, clips) + F.mse_loss(video, clips)
        loss: Tensor = error + KL_WEIGHT * _divergence(posterior)
        return loss

    run = ModuleRun("VAE", steps, 2e-3, folder / "vae.safetensors")
    train_module(vae, run, loss_of_step, progress)
    set_statistics(vae, seed, statistics_scenes)


def _divergence(posterior: Any) -> Tensor:
    """Return the mean KL divergence of each latent number from a standard normal."""
    mean, variance, log_variance = (
        value.float() for value in (posterior.mean, posterior.var, posterior.logvar)
    )
    result: Tensor = 0.5 * (mean.square() + variance - 1 - log_variance).mean()
    return result


@torch.no_grad()
def set_statistics(vae: Any, seed: int, scenes: int) -> None:
    """Measure mean and deviation of each latent channel, and store them in the VAE's config."""
    latents = torch.cat(
        [
            vae.encode(make_clips(seed, first, 8, 17, *PICTURE)).latent_dist.mean
            for first in range(0, scenes, 8)
        ]
    )
    vae.register_to_config(
        latents_mean=latents.mean((0, 2, 3, 4)).tolist(),
        latents_std=latents.std((0, 2, 3, 4)).tolist(),
    )


@torch.no_grad()
def measure_vae(vae: Any, seed: int, count: int = 32, frames: int = 17) -> dict[str, float]:
    """Measure a VAE on held-out scenes.

    Returns:
        `psnr`: mean over clips, dB. `worst_psnr`: of the worst clip. `flicker`: mean absolute
        change between neighbouring frames of the error, as a share of 1: what would shimmer.
    """
    values, flicker = [], []
    for first in range(0, count, 4):
        clips = make_clips(seed, first, 4, frames, *PICTURE, held_out=True)
        video = vae.decode(vae.encode(clips).latent_dist.mode()).sample
        error = (video - clips) / 2
        values += [float(-10 * e.square().mean().log10()) for e in error]
        flicker.append(float(error.diff(dim=2).abs().mean()))
    return {
        "psnr": sum(values) / len(values),
        "worst_psnr": min(values),
        "flicker": sum(flicker) / len(flicker),
    }
