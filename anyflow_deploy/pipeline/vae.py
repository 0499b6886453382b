"""Latents to pixels, with the checkpoint's own Wan VAE.

This is the one place where latents are laid out (B, C, F, H, W), as diffusers' VAE wants them, and where the
per-channel scaling that the transformer works in is undone.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from anyflow_deploy.engines.engine import Array


def decoded_video(pipeline: Path, latents: Array) -> NDArray[np.uint8]:
    """Pixels of clean latents.

    Args:
        pipeline: folder with vae/.
        latents: float32 (B, F, C, H, W).

    Returns:
        (B, frames, height, width, 3), 0 to 255.
    """
    import torch
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan.from_pretrained(pipeline / "vae", dtype=torch.float32, use_safetensors=True).eval()
    z = torch.from_numpy(np.array(latents)).permute(0, 2, 1, 3, 4)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std))
    with torch.no_grad():
        pixels = vae.decode(z * std + mean, return_dict=False)[0]
    video = (pixels.permute(0, 2, 3, 4, 1).clamp(-1, 1) + 1) * 127.5
    return np.asarray(video.round().to(torch.uint8).numpy(), dtype=np.uint8)
