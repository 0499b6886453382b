"""`profile.json`: everything a profile holds, typed.

Times are seconds, memory bytes, energy joules, rates per second.

A profile names what it was made of (bundle, engine, machine, clocks, versions) and how (`Method`),
so that two profiles can be compared, or refused. What could not be measured is not left out in
silence: `absent` has its reason.

Times are in `record_times.py`, memory, power and clocks in `record_device.py`; this module exports
all of them.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from anyflow_deploy.profiling.record_base import ProfileRecord
from anyflow_deploy.profiling.record_device import Conditions, MemoryUsage, PowerUsage, Series
from anyflow_deploy.profiling.record_times import (
    Ceilings,
    ChunkLatencies,
    ClipLatency,
    Latency,
    Layer,
    Layers,
    Point,
    Roofline,
    Warmup,
)

__all__ = [
    "SCHEMA",
    "Advice",
    "Ceilings",
    "ChunkLatencies",
    "ClipLatency",
    "Conditions",
    "EndToEnd",
    "Latency",
    "Layer",
    "Layers",
    "MemoryUsage",
    "Method",
    "Point",
    "PowerUsage",
    "Profile",
    "Roofline",
    "Series",
    "StageTiming",
    "Subject",
    "Warmup",
]

SCHEMA = 1
"""Raised whenever a reader of the old schema would misread a new profile."""


class Method(ProfileRecord):
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


class Subject(ProfileRecord):
    """The bundle and the engine that were measured."""

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


class StageTiming(ProfileRecord):
    """Times and memory of the text encoder or the VAE.

    Args:
        parts: times of parts, such as "first chunk" of the VAE.
    """

    name: str
    device: str
    load_seconds: float
    latency: Latency
    parts: dict[str, Latency] = Field(default_factory=dict)
    memory: MemoryUsage


class EndToEnd(ProfileRecord):
    """Times from a prompt to frames with everything loaded: sums of medians.

    Args:
        seconds: of each stage.
        first_frame: until the first frame is decoded: text, first chunk (bidirectional: the whole
            clip), its share of the VAE.
        cold_start: loading all three stages, before that.
    """

    shape: str
    steps: int
    seconds: dict[str, float]
    total: float
    first_frame: float
    cold_start: float
    frames_per_second: float
    real_time_factor: float


class Advice(ProfileRecord):
    """What to do, and the measurement that it is based on.

    Args:
        kind: a short name, such as "memory-bound".
        weight: "problem" (the numbers cannot be trusted, or time is lost), "hint" or "note".
    """

    kind: str
    weight: Literal["problem", "hint", "note"]
    text: str
    measurement: str


class Profile(ProfileRecord):
    """The whole file."""

    schema_version: int = Field(default=SCHEMA, alias="schema")
    created: str
    tool: str
    subject: Subject
    machine: dict[str, Any]
    method: Method
    points: list[Point]
    stages: list[StageTiming]
    end_to_end: list[EndToEnd]
    memory: MemoryUsage
    power: list[PowerUsage]
    conditions: Conditions
    ceilings: Ceilings | None
    layers: list[Layers]
    advice: list[Advice]
    absent: dict[str, str]
