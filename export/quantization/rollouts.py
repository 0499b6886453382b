"""Whole videos through a PyTorch network, for what is learned by watching it: ranges, and the
damage of rounding.

One function serves both kinds of model: a bidirectional one makes the video at once, a causal one
chunk by chunk.

`calibration_schedules` is the any-step part. A flow map may be asked for any (t, r), but an even
schedule of few steps, shifted as the models were distilled, never comes below t = 400 before its
last jump. So beside the uniform schedules there are *sweeps*: one walks evenly down to t = 60, and
four stop once on the way (1000 to t, t to 0), which is how large jumps into and out of low times
are seen.

Legend: F latent frames, C channels, H W latent rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from anyflow_deploy.engines.engine import Array
from anyflow_deploy.engines.kv_cache import cache_plan, fit_chunks
from anyflow_deploy.engines.sampler import sample, stream
from anyflow_deploy.engines.validation import REFERENCE_SCHEDULE
from anyflow_deploy.export.torch_engine import TorchEngine
from anyflow_deploy.models import MODELS, SPATIAL_FACTOR, TEMPORAL_FACTOR, Architecture, model_name
from anyflow_deploy.schedule import Schedule, Step
from anyflow_deploy.shape_ranges import latent_frames, latent_side, widest_ranges

SWEEPS = (REFERENCE_SCHEDULE, *(Schedule.from_timesteps((1000, t, 0)) for t in (750, 500, 250, 60)))


def calibration_schedules(steps: Sequence[int], shift: float) -> dict[str, Schedule]:
    """Schedules by name: "4 steps" for the uniform ones, "sweep 0", … for the others."""
    uniform = {f"{n} steps": Schedule.uniform(n, shift) for n in steps}
    return {**uniform, **{f"sweep {index}": schedule for index, schedule in enumerate(SWEEPS)}}


def chunk_plan(a: Architecture, frames: int) -> tuple[int, ...]:
    """A causal model's own chunks, cut or lengthened by more of its longest to so many latent
    frames; () if bidirectional."""
    return () if a.chunk_partition is None else fit_chunks(a.chunk_partition, frames)


def count_transitions(a: Architecture, frames: int, schedule: Schedule) -> int:
    """How many transitions a rollout makes."""
    return schedule.steps * max(1, len(chunk_plan(a, frames)))


def run_rollout(
    engine: TorchEngine,
    latents: Array,
    text: Array,
    schedule: Schedule,
    on_step: Callable[[Step], None] | None = None,
) -> Array:
    """One video from noise (1, F, C, H, W) and text (1, L, D): clean latents, float32 (1, F, C, H,
    W)."""
    plan = chunk_plan(engine.architecture, latents.shape[1])
    if not plan:
        return sample(engine, latents, text, schedule, on_step)
    chunks = stream(engine, latents, text, schedule, plan, on_step=on_step)
    return np.concatenate([chunk.latents for chunk in chunks], axis=1)


def latent_shape(
    a: Architecture, frames: int | None, height: int | None, width: int | None
) -> tuple[int, int, int, int]:
    """(F, C, H, W) of a video of so many frames and pixels; None for the size the model generates.

    Raises:
        ShapeError: frames that are not 4n+1, sides that the patches do not divide, or more than the
            rotary table holds.
    """
    row = MODELS.get(model_name(a), MODELS["1.3b"])
    patch = a.patch_size[1]
    own = (sum(a.chunk_partition) - 1) * TEMPORAL_FACTOR + 1 if a.chunk_partition else row.video[0]
    count = latent_frames(own if frames is None else frames, TEMPORAL_FACTOR)
    high = latent_side(row.video[1] if height is None else height, SPATIAL_FACTOR, patch, "height")
    wide = latent_side(row.video[2] if width is None else width, SPATIAL_FACTOR, patch, "width")
    plan = chunk_plan(a, count)
    widest_ranges(a).check(
        (1, max(plan, default=count), a.in_channels, high, wide), (1, 1, a.text_dim)
    )
    if plan:
        cache_plan(a, plan, high, wide)
    return count, a.in_channels, high, wide
