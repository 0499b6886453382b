"""Sample grids: one picture of what the model generates for some prompts in 1, 2, 4, 8 and 16
steps.

Rows are prompts, columns numbers of steps, all from the same noise, so that a flow map that works
shows the same picture along a row. A pipeline's VAE decodes where there is one; without, three
latent channels are shown as colours.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anyflow_deploy.bundle.atomic_io import atomic_file
from anyflow_deploy.schedule import Schedule
from anyflow_deploy.training.chunks import ChunkPlan
from anyflow_deploy.training.data.source import Batch
from anyflow_deploy.training.model.network import TrainingTransformer
from anyflow_deploy.training.rollout import rollout
from anyflow_deploy.training.timestep_sampling import seeded_normal

ROWS = 4


@torch.no_grad()
def generate_grid_samples(
    network: TrainingTransformer,
    batch: Batch,
    plan: ChunkPlan,
    steps: tuple[int, ...],
    shift: float,
    seed: int,
) -> list[Tensor]:
    """Generate the samples of a grid, one tensor (rows, F, C, H, W) for each number of steps.

    They are of the batch's first prompts. Every process has to call it (FSDP).
    """
    rows = min(ROWS, len(batch.latents))
    noise = seeded_normal((rows, *batch.latents.shape[1:]), seed, "sheet").to(batch.latents.device)
    text = batch.text[:rows]
    return [
        rollout(network, noise, text, plan, list(Schedule.uniform(n, shift).transitions)).cpu()
        for n in steps
    ]


def draw_sample_grid(
    path: Path,
    samples: list[Tensor],
    names: tuple[str, ...],
    steps: tuple[int, ...],
    pipeline: Path | None,
) -> None:
    """Draw the middle frame of each sample, and write the grid as a PNG.

    `names` are written beside the rows.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = len(samples[0])
    figure, axes = pyplot.subplots(
        rows, len(steps), figsize=(2.4 * len(steps), 1.8 * rows), squeeze=False
    )
    for column, (samples_of_column, count) in enumerate(zip(samples, steps, strict=True)):
        for row in range(rows):
            cell = axes[row][column]
            cell.imshow(_decode_middle_frame(samples_of_column[row : row + 1], pipeline))
            cell.set_xticks([])
            cell.set_yticks([])
            if row == 0:
                cell.set_title(f"{count} step{'s' if count > 1 else ''}", fontsize=9)
            if column == 0:
                cell.set_ylabel(textwrap.fill(names[row][:60], 24), fontsize=6)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial:
        figure.savefig(partial, dpi=100, format="png")
    pyplot.close(figure)


def _decode_middle_frame(latents: Tensor, pipeline: Path | None) -> NDArray[np.uint8]:
    if pipeline is not None:
        from anyflow_deploy.pipelines.vae import decode_video

        frames: NDArray[np.uint8] = decode_video(pipeline, latents.numpy())[0]
        middle_frame: NDArray[np.uint8] = frames[len(frames) // 2]
        return middle_frame
    middle = latents[0, latents.shape[1] // 2, :3].permute(1, 2, 0)
    if middle.shape[-1] < 3:
        middle = middle[..., :1].expand(-1, -1, 3)
    colours: NDArray[np.uint8] = (
        ((middle.clamp(-3, 3) / 6 + 0.5) * 255).nan_to_num(0.0).to(torch.uint8).numpy()
    )
    return colours
