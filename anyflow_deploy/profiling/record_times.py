"""The part of a profile that holds times: what was timed, held against what the hardware could do,
and split into layers.

Times are seconds, memory bytes, rates per second.
"""

from __future__ import annotations

from pydantic import Field

from anyflow_deploy.profiling.record_base import ProfileRecord


class Latency(ProfileRecord):
    """Seconds of one thing that was done `count` times.

    Args:
        interval: where the true median lies, with 95 % confidence.
        deviation: standard deviation.
        outliers: samples far out above; they are in all the other numbers.
        drift: median of the second half over that of the first, less 1.
        samples: all of them, in order.
    """

    count: int = Field(ge=1)
    minimum: float
    mean: float
    median: float
    p90: float
    p95: float
    p99: float
    maximum: float
    deviation: float
    interval: tuple[float, float]
    outliers: int
    drift: float
    samples: list[float]

    @property
    def variation(self) -> float:
        """Coefficient of variation."""
        return self.deviation / self.mean if self.mean else 0.0


class Warmup(ProfileRecord):
    """What ran before anything counted."""

    runs: int
    seconds: float
    steady: bool


class ClipLatency(ProfileRecord):
    """A whole video's latents, without text encoder and VAE.

    Args:
        frames_per_second: video frames made in a second, at the median.
        real_time_factor: that, over the playback rate; above 1 is faster than it plays.
        joules: of each power source, for one clip.
    """

    steps: int
    latency: Latency
    frames_per_second: float
    real_time_factor: float
    joules: dict[str, float] = Field(default_factory=dict)


class ChunkLatencies(ProfileRecord):
    """A causal clip chunk by chunk, at one number of steps.

    Args:
        first: from the call to the first chunk's latents.
        later: from asking for a chunk to having it; what is remembered of the one before is in it.
        by_index: median of every chunk.
        remember: making the cache's entries after a chunk.
        frames: video frames of every chunk.
        cached_tokens: that every chunk finds.
        worst_real_time_factor: of the slowest later chunk's median: below 1 a player runs dry.
    """

    steps: int
    first: Latency
    later: Latency | None
    by_index: list[float]
    remember: Latency | None
    frames: list[int]
    cached_tokens: list[int]
    worst_real_time_factor: float


class Ceilings(ProfileRecord):
    """What the hardware can do at most.

    Args:
        operations: per second, by type.
        bandwidth: bytes per second.
        source: measured here, or the title of a document.
        measured: whether it was measured here.
    """

    name: str
    operations: dict[str, float]
    bandwidth: float
    source: str
    measured: bool


class Roofline(ProfileRecord):
    """One transition against the ceilings.

    Args:
        operations: by the type they run in, two for each multiplication with addition.
        bytes: that have to be read at least: weights and cache once, state in and out.
        compute_seconds, memory_seconds: what each alone would take at the ceiling; the larger one
            is the bound.
        efficiency: the bound over the measured median.
    """

    operations: dict[str, float]
    bytes: float
    compute_seconds: float
    memory_seconds: float
    efficiency: float | None

    @property
    def bound(self) -> float:
        """Seconds that no engine can go below."""
        return max(self.compute_seconds, self.memory_seconds)

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return sum(self.operations.values()) / self.bytes


class Point(ProfileRecord):
    """One shape.

    Args:
        shape: "480x832x81".
        latents: (1, F, C, H, W).
        tokens: of a transition (causal: of the largest chunk).
        transition: every transition in every clip.
        largest_transition: median of the one with the most tokens in it and in its cache (causal:
            the others are smaller).
        enqueue: until a transition was handed to the GPU, where the backend can tell.
        fixed_seconds: of a clip that do not depend on the number of steps, by a straight line
            through the medians.
    """

    shape: str
    latents: list[int]
    frames: int
    tokens: int
    text_tokens: int
    warm_up: Warmup
    transition: Latency
    largest_transition: float
    enqueue: Latency | None
    clips: list[ClipLatency]
    fixed_seconds: float | None
    chunks: list[ChunkLatencies] = Field(default_factory=list)
    roofline: Roofline | None


class Layer(ProfileRecord):
    """One layer (or all of a kind), in one transition.

    Args:
        seconds: in one transition.
        operations, bytes: 0 where they cannot be told from the profiler.
        module: the ONNX node it came from, where the name is another.
    """

    name: str
    operator: str
    seconds: float
    share: float
    calls: int
    operations: float = 0.0
    bytes: float = 0.0
    module: str = ""


class Layers(ProfileRecord):
    """Where a transition's time goes.

    Args:
        source: which profiler.
        graph: of the bundle.
        transitions: that were profiled.
        seconds: of all layers of one transition.
        overhead: a transition under the profiler over one without, less 1.
        rows: slowest first; by_operator and by_part: the same, added up.
    """

    source: str
    graph: str
    shape: str
    transitions: int
    seconds: float
    overhead: float
    rows: list[Layer]
    by_operator: list[Layer]
    by_part: list[Layer]
