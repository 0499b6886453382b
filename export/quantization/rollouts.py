"""Whole videos through a PyTorch network, for calibration and sensitivity.

One function serves both kinds of model: a bidirectional one generates the video at once, a causal
one chunk by chunk. It also runs several videos as one batch: with a small model most of the time
goes into calling operators, not into their arithmetic.

`calibration_schedules` covers any number of steps. A flow map may be called with any (t, r), but an
even schedule of few steps, shifted as the models were distilled, never comes below t = 400 before
its last step. So beside the uniform schedules there are *sweeps*: one goes evenly down to t = 60,
and four have one intermediate time (1000 to t, t to 0), so that large steps to and from low times
are measured, too.

Legend: B videos, F latent frames, C channels, H W latent rows and columns, L text tokens, D text
channels.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence

import numpy as np

from anyflow_deploy.engines.engine import Array
from anyflow_deploy.engines.kv_cache import cache_plan, fit_chunks
from anyflow_deploy.engines.sampler import sample
from anyflow_deploy.engines.validation import REFERENCE_SCHEDULE
from anyflow_deploy.export.torch_engine import TorchEngine
from anyflow_deploy.memory.parameter_shapes import parameter_shapes
from anyflow_deploy.models import MODELS, SPATIAL_FACTOR, TEMPORAL_FACTOR, Architecture, model_name
from anyflow_deploy.schedule import Schedule, Step
from anyflow_deploy.shape_ranges import latent_frames, latent_side, widest_ranges

SMALL_PARAMETERS = 50_000_000
"""Of a model that the table does not have and that is calibrated with small videos. The smallest
released one has 26 times as many."""

SMALL_FRAMES, SMALL_HEIGHT, SMALL_WIDTH = 17, 128, 224
"""Size of those videos; causal ones have the frames of `calibration_shape`."""

SWEEPS = (REFERENCE_SCHEDULE, *(Schedule.from_timesteps((1000, t, 0)) for t in (750, 500, 250, 60)))


def calibration_schedules(steps: Sequence[int], shift: float) -> dict[str, Schedule]:
    """Return the schedules by name: "4 steps" for a uniform one, "sweep 0", … for the others."""
    uniform = {f"{n} steps": Schedule.uniform(n, shift) for n in steps}
    return {**uniform, **{f"sweep {index}": schedule for index, schedule in enumerate(SWEEPS)}}


def chunk_plan(a: Architecture, frames: int) -> tuple[int, ...]:
    """Return a causal model's chunks for so many latent frames; () if bidirectional.

    They are the model's own, cut short or lengthened by more of its longest.
    """
    return () if a.chunk_partition is None else fit_chunks(a.chunk_partition, frames)


def count_transitions(a: Architecture, frames: int, schedule: Schedule) -> int:
    """Return how many transitions a rollout runs."""
    return schedule.steps * max(1, len(chunk_plan(a, frames)))


def run_rollout(
    engine: TorchEngine,
    latents: Array,
    text: Array,
    schedule: Schedule,
    on_step: Callable[[Step], None] | None = None,
) -> Array:
    """Generate videos, clean latents, float32 (B, F, C, H, W).

    Latents are noise (B, F, C, H, W), and text is (B, L, D). `on_step` is called after each
    transition of the batch.
    """
    a = engine.architecture
    chunks = chunk_plan(a, latents.shape[1])
    if not chunks:
        return sample(engine, latents, text, schedule, on_step)
    height, width = latents.shape[3:]
    plan = cache_plan(a, chunks, height, width, text_tokens=text.shape[1])
    finished: list[Array] = []
    # As sampler.stream, which makes one video at a time
    with contextlib.closing(engine.open_streams(text, plan)) as streams:
        for index, frames in enumerate(chunks):
            first = plan.first_frame(index)
            chunk_noise = np.ascontiguousarray(latents[:, first : first + frames])
            start = functools.partial(streams.start, chunk_noise)
            finished.append(schedule.run(start, chunk_noise.shape, on_step or (lambda step: None)))
            if index + 1 < len(chunks):
                streams.append(finished[-1])
    return np.concatenate(finished, axis=1)


def count_tokens(a: Architecture, shape: Sequence[int], text_tokens: int) -> int:
    """Return the tokens that one forward of a video works with: its own, cached ones, the text's.

    `shape` is (F, C, H, W) of the latents.
    """
    frames, _, height, width = shape
    patch = a.patch_size[1]
    chunks = chunk_plan(a, frames)
    cached = cache_plan(a, chunks, height, width).capacity if chunks else 0
    own = max(chunks, default=frames) * (height // patch) * (width // patch)
    return own + cached + text_tokens


def calibration_shape(
    a: Architecture,
    frames: int | None,
    height: int | None,
    width: int | None,
    thorough: bool = False,
) -> tuple[int, int, int, int]:
    """Return (F, C, H, W) of a calibration's videos; None stands for the default.

    The default is the video that the model generates. Unless thorough, it is shorter for a causal
    model: the chunks until full and compressed ones are both in the cache, and one more. And it is
    smaller for a small model that the table does not have: nobody has said what it generates.

    Raises:
        ShapeError: see `latent_shape`.
    """
    if not thorough:
        if frames is None and a.chunk_partition is not None and a.full_chunk_limit is not None:
            count = sum(a.chunk_partition[: a.full_chunk_limit + 2])
            frames = (count - 1) * TEMPORAL_FACTOR + 1
        if is_small_and_unknown(a):
            frames = SMALL_FRAMES if frames is None else frames
            height = SMALL_HEIGHT if height is None else height
            width = SMALL_WIDTH if width is None else width
    return latent_shape(a, frames, height, width)


def is_small_and_unknown(a: Architecture) -> bool:
    """Return whether the table does not have a model, and it has few parameters."""
    parameters = sum(math.prod(shape) for shape in parameter_shapes(a).values())
    return model_name(a) not in MODELS and parameters < SMALL_PARAMETERS


def latent_shape(
    a: Architecture, frames: int | None, height: int | None, width: int | None
) -> tuple[int, int, int, int]:
    """Return (F, C, H, W) of a video; None stands for the size that the model generates.

    `frames`, `height` and `width` are those of the video, in frames and pixels.

    Raises:
        ShapeError: frames that are not 4n+1, sides that the patches do not divide, or more than the
            rotary table holds.
    """
    row = MODELS.get(model_name(a), MODELS["1.3b"])
    patch = a.patch_size[1]
    default_frames = (
        (sum(a.chunk_partition) - 1) * TEMPORAL_FACTOR + 1 if a.chunk_partition else row.video[0]
    )
    count = latent_frames(default_frames if frames is None else frames, TEMPORAL_FACTOR)
    rows = latent_side(row.video[1] if height is None else height, SPATIAL_FACTOR, patch, "height")
    columns = latent_side(row.video[2] if width is None else width, SPATIAL_FACTOR, patch, "width")
    plan = chunk_plan(a, count)
    widest_ranges(a).check(
        (1, max(plan, default=count), a.in_channels, rows, columns), (1, 1, a.text_dim)
    )
    if plan:
        cache_plan(a, plan, rows, columns)
    return count, a.in_channels, rows, columns
