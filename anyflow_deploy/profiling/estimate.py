"""Compute a bound for hardware that is not here, from its data sheet.

No engine on that device can be faster than this. How much slower one is has to be measured
there; engines for large shapes reach a third to four fifths of the bound, and small shapes
far less.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from anyflow_deploy.engines.kv_cache import cache_plan, fit_chunks
from anyflow_deploy.memory.estimate import LatentShape, available_memory, estimate_memory
from anyflow_deploy.models import FPS, TEMPORAL_FACTOR, TEXT_TOKENS, Architecture
from anyflow_deploy.profiling.operations import compute_types, stream_costs, transition_cost
from anyflow_deploy.profiling.record import Roofline
from anyflow_deploy.profiling.roofline import ceilings_from_target, roofline
from anyflow_deploy.targets import Target, check_precision

LABEL = "a bound computed from a data sheet, not a measurement: nothing was run"


class ClipBound(BaseModel):
    """Least seconds of a clip; causal also of its `first_chunk` and `slowest_chunk`.

    `slowest_chunk` is that of the later chunks.
    """

    model_config = ConfigDict(frozen=True)

    steps: int
    seconds: float
    real_time_factor: float
    first_chunk: float | None = None
    slowest_chunk: float | None = None


class RooflineEstimate(BaseModel):
    """The bound of one shape."""

    model_config = ConfigDict(frozen=True)

    label: str = LABEL
    model: str
    precision: str
    target: str
    device: str
    source: str
    shape: str
    tokens: int
    transition: Roofline
    bound_by: str
    clips: list[ClipBound]
    memory: dict[str, Any] = Field(
        description="bytes needed and available, by anyflow-fit's arithmetic"
    )


def estimate_latency(
    model: str,
    a: Architecture,
    precision: str,
    base: str,
    target: Target,
    shape: LatentShape,
    steps: tuple[int, ...],
    window: int | None = None,
    attention: str = "high",
) -> RooflineEstimate:
    """Compute the bound of one shape on a target.

    Args:
        model: its name, for the report.
        a: its architecture.
        precision, base, attention: of the bundle.
        target: a row with throughputs.
        shape: of the video.
        steps: numbers of steps.
        window: of a causal cache.

    Raises:
        AnyFlowError: a target without throughputs, or one that does not run the precision.
    """
    check_precision(target, precision)
    ceilings = ceilings_from_target(target)
    types = compute_types(precision, base, attention)
    sides = (shape.height, shape.width)
    frames = (shape.frames - 1) * TEMPORAL_FACTOR + 1
    clips = []
    if a.chunk_partition is None:
        cost = transition_cost(a, types, (shape.frames, *sides), TEXT_TOKENS)
        tokens = shape.tokens(a)
        for count in steps:
            seconds = roofline(cost, ceilings, None).bound * count
            clips.append(
                ClipBound(steps=count, seconds=seconds, real_time_factor=frames / seconds / FPS)
            )
    else:
        plan = cache_plan(a, fit_chunks(a.chunk_partition, shape.frames), *sides, window)
        tokens = plan.full_tokens * max(plan.chunks)
        cost = transition_cost(
            a, types, (max(plan.chunks), *sides), TEXT_TOKENS, plan.capacity, with_text=False
        )
        for count in steps:
            chunks = [
                roofline(chunk, ceilings, None).bound
                for chunk in stream_costs(a, types, plan, sides, count)
            ]
            clips.append(
                ClipBound(
                    steps=count,
                    seconds=sum(chunks),
                    real_time_factor=frames / sum(chunks) / FPS,
                    first_chunk=chunks[0],
                    slowest_chunk=max(chunks[1:], default=None),
                )
            )
    roof = roofline(cost, ceilings, None)
    need = estimate_memory(a, precision, target, shape, window)
    return RooflineEstimate(
        model=model,
        precision=precision,
        target=target.name,
        device=target.device,
        source=ceilings.source,
        shape=str(shape),
        tokens=tokens,
        transition=roof,
        bound_by="memory" if roof.memory_seconds > roof.compute_seconds else "products",
        clips=clips,
        memory={
            "needed": need.total,
            "available": available_memory(target),
            "fits": need.total <= available_memory(target),
        },
    )
