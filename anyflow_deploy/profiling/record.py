"""`profile.json`: everything a profile holds, typed. Times are seconds, memory bytes, energy joules, rates per second.

A profile names what it was made of (bundle, engine, machine, clocks, versions) and how (`Method`), so that two of them can be
compared, or refused comparison. Whatever could not be measured is not left out in silence: its reason stands in `absent`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA = 1
"""Raised whenever a reader of the old schema would misread a new profile."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class Latency(_Record):
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


class Method(_Record):
    """How it was measured.

    Args:
        clock: name, implementation and resolution of the clock, and what reading it twice takes.
        warm_up, rounds, outliers, percentiles, synchronization: the rules, in words.
        seconds: budget of the measured rounds of each shape.
    """

    clock: dict[str, Any]
    warm_up: str
    rounds: str
    outliers: str
    percentiles: str
    synchronization: str
    seconds: float


class Subject(_Record):
    """What was run."""

    bundle: str
    digest: str
    model: str
    kind: Literal["bidirectional", "causal"]
    precision: str
    base: str
    layers: int
    parameters: int
    engine: str
    backend: str
    provider: str
    threads: int | None
    load_seconds: float
    build_seconds: float | None = None


class Warmup(_Record):
    """What ran before anything counted."""

    runs: int
    seconds: float
    steady: bool


class Clip(_Record):
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
    joules: dict[str, float] = {}


class Chunks(_Record):
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


class Ceilings(_Record):
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


class Roofline(_Record):
    """One transition against the ceilings.

    Args:
        operations: by the type they run in, two for each multiplication with addition.
        bytes: that have to be read at least: weights and cache once, state in and out.
        compute_seconds, memory_seconds: what each alone would take at the ceiling; the larger one is the bound.
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


class Point(_Record):
    """One shape.

    Args:
        shape: "480x832x81".
        latents: (1, F, C, H, W).
        tokens: of a transition (causal: of the largest chunk).
        transition: every transition in every clip.
        largest_transition: median of the one with the most tokens in it and in its cache (causal: the others are smaller).
        enqueue: until a transition was handed to the GPU, where the backend can tell.
        fixed_seconds: of a clip that do not depend on the number of steps, by a straight line through the medians.
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
    clips: list[Clip]
    fixed_seconds: float | None
    chunks: list[Chunks] = []
    roofline: Roofline | None


class Layer(_Record):
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


class Layers(_Record):
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


class Memory(_Record):
    """Peaks; CPU and GPU apart, never added: on a Jetson they are the same chips.

    Args:
        cpu_loaded, cpu_peak: resident bytes of this process.
        gpu_peak: bytes on the device; None without one.
        unified: processor and GPU share one memory, and each counts what both use.
        method: how each was read.
    """

    cpu_before: int
    cpu_loaded: int
    cpu_peak: int
    gpu_loaded: int | None
    gpu_peak: int | None
    unified: bool
    method: str


class Stage(_Record):
    """Text encoder or VAE.

    Args:
        parts: such as "first chunk" of the VAE.
    """

    name: str
    device: str
    load_seconds: float
    latency: Latency
    parts: dict[str, Latency] = {}
    memory: Memory


class EndToEnd(_Record):
    """A prompt becomes frames, everything loaded: sums of medians.

    Args:
        seconds: by stage.
        first_frame: until the first frame is decoded: text, first chunk (bidirectional: the whole clip), its share of the VAE.
        cold_start: loading everything comes before that.
    """

    shape: str
    steps: int
    seconds: dict[str, float]
    total: float
    first_frame: float
    cold_start: float
    frames_per_second: float
    real_time_factor: float


class Power(_Record):
    """One power source over the measured rounds.

    Args:
        kind: what it covers.
        idle_watts: before the rounds began, engine loaded.
        joules: in the measured rounds.
        samples: seconds since the rounds began, watts.
    """

    name: str
    kind: Literal["gpu", "cpu", "memory", "board"]
    method: str
    idle_watts: float | None
    mean_watts: float
    peak_watts: float
    joules: float
    samples: list[tuple[float, float]]


class Series(_Record):
    """Something read again and again, such as a clock: seconds since the rounds began, value."""

    name: str
    unit: str
    samples: list[tuple[float, float]]


class Conditions(_Record):
    """What the machine was doing meanwhile.

    Args:
        other_load: processor cores that others kept busy, on average; None where it cannot be told.
        throttle: reasons that the hardware gave, with the share of samples.
        series: clocks and temperatures.
    """

    other_load: float | None
    throttle: dict[str, float]
    series: list[Series]


class Advice(_Record):
    """What to do, and the measurement it rests on.

    Args:
        kind: a short name, such as "memory-bound".
        weight: "problem" (the numbers cannot be trusted, or time is lost), "hint" or "note".
    """

    kind: str
    weight: Literal["problem", "hint", "note"]
    text: str
    measurement: str


class Profile(_Record):
    """The whole file."""

    schema_version: int = Field(default=SCHEMA, alias="schema")
    created: str
    tool: str
    subject: Subject
    machine: dict[str, Any]
    method: Method
    points: list[Point]
    stages: list[Stage]
    end_to_end: list[EndToEnd]
    memory: Memory
    power: list[Power]
    conditions: Conditions
    ceilings: Ceilings | None
    layers: list[Layers]
    advice: list[Advice]
    absent: dict[str, str]
