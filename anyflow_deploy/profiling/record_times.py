"""The part of a profile that holds times: latencies, ceilings and layers.

Times are seconds, memory bytes, rates per second.
"""

from __future__ import annotations

from pydantic import Field

from anyflow_deploy.profiling.record_base import ProfileRecord


class Latency(ProfileRecord):
    """Seconds of something that ran `count` times.

    Args:
        interval: where the true median lies, with 95 % confidence.
        deviation: standard deviation.
        outliers: number of far too long samples; the other numbers include them.
        drift: median of the second half over that of the first, less 1.
        samples: all seconds, in order.
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
    """The runs before the measured ones."""

    runs: int
    seconds: float
    steady: bool


class ClipLatency(ProfileRecord):
    """Times of a whole video's latents, without text encoder and VAE.

    Args:
        frames_per_second: video frames generated in a second, at the median.
        real_time_factor: frames_per_second over the playback rate; above 1 is faster than it plays.
        joules: energy of one clip, by power source.
    """

    steps: int
    latency: Latency
    frames_per_second: float
    real_time_factor: float
    joules: dict[str, float] = Field(default_factory=dict)


class ChunkLatencies(ProfileRecord):
    """Times of a causal clip chunk by chunk, at one number of steps.

    Args:
        first: seconds from the call to the first chunk's latents.
        later: seconds of each later chunk, including caching the one before it.
        by_index: median of every chunk.
        remember: seconds of caching a chunk.
        frames: video frames of every chunk.
        cached_tokens: tokens that every chunk finds in the cache.
        worst_real_time_factor: of the slowest later chunk's median; below 1, playback stalls.
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
    """The highest rates of the hardware.

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
    """One transition compared with the ceilings.

    Args:
        operations: by the type they run in; two for each multiplication with addition.
        bytes: least bytes that move: weights and cache once, state in and out.
        compute_seconds, memory_seconds: seconds of each alone at the ceiling; the larger one is the
            bound.
        efficiency: the bound over the measured median.
    """

    operations: dict[str, float]
    bytes: float
    compute_seconds: float
    memory_seconds: float
    efficiency: float | None

    @property
    def bound(self) -> float:
        """Seconds that no engine can beat."""
        return max(self.compute_seconds, self.memory_seconds)

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return sum(self.operations.values()) / self.bytes


class Point(ProfileRecord):
    """All times of one shape.

    Args:
        shape: "480x832x81".
        latents: (1, F, C, H, W).
        tokens: of a transition (causal: of the largest chunk).
        transition: times of every transition in every clip.
        largest_transition: median of the transition with the most tokens in itself and its cache.
        enqueue: times of launching a transition on the GPU; None where they are unknown.
        fixed_seconds: seconds of a clip that do not depend on the number of steps, from a straight
            line through the medians.
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
    """One layer, or all of a kind, in one transition.

    Args:
        seconds: of one transition.
        operations, bytes: 0 where they are unknown.
        module: name of the ONNX node, where `name` is another.
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
    """The time of a transition, layer by layer.

    Args:
        source: name of the profiler.
        graph: name of the bundle's graph.
        transitions: number of profiled transitions.
        seconds: sum over all layers of one transition.
        overhead: a transition's time under the profiler over its time without, less 1.
        rows: layers, slowest first.
        by_operator, by_part: the same, summed.
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
