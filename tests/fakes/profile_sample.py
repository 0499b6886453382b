"""A profile made up for tests: plausible numbers, nothing measured. Rules, comparison and page are
tried on variations of it."""

from __future__ import annotations

from typing import Any

from anyflow_deploy import Bundle
from anyflow_deploy.profiling.operations import compute_types, transition_cost
from anyflow_deploy.profiling.record import (
    Ceilings,
    ClipLatency,
    Conditions,
    Layer,
    Layers,
    MemoryUsage,
    Method,
    Point,
    Profile,
    Roofline,
    Subject,
    Warmup,
)
from anyflow_deploy.profiling.summary_statistics import latency_from_samples


def steady_samples(median: float, count: int = 120) -> list[float]:
    """Samples within 1 % of a value."""
    return [median * (1 + 0.01 * ((7 * n) % 11 - 5) / 5) for n in range(count)]


def sample_profile(step: float = 0.1, **changes: Any) -> Profile:
    """A steady GPU-less profile with transitions of so many seconds; nothing in it calls for a
    warning."""
    values: dict[str, Any] = {
        "created": "2026-11-23T08:00:00+0000",
        "tool": "anyflow-profile test",
        "subject": Subject(
            bundle="bundle",
            digest="00",
            model="1.3b",
            kind="bidirectional",
            precision="fp32",
            base="fp32",
            layers=30,
            parameters=10**9,
            engine="ONNX Runtime",
            backend="onnxruntime",
            provider="cpu",
            threads=2,
            load_seconds=3.0,
        ),
        "machine": {
            "cpu": "processor",
            "cores": 2,
            "governor": "performance",
            "versions": {"onnxruntime": "1.32.0"},
        },
        "method": Method(
            clock={"name": "c"},
            warm_up="w",
            rounds="r",
            outliers="o",
            percentiles="p",
            synchronization="s",
            seconds=20,
        ),
        "points": [sample_point(step)],
        "stages": [],
        "end_to_end": [],
        "memory": MemoryUsage(
            cpu_before=10**8,
            cpu_loaded=10**9,
            cpu_peak=2 * 10**9,
            gpu_loaded=None,
            gpu_peak=None,
            unified=False,
            method="m",
        ),
        "power": [],
        "conditions": Conditions(other_load=0.0, throttle={}, series=[]),
        "ceilings": Ceilings(
            name="this processor",
            operations={"fp32": 1e11},
            bandwidth=2e10,
            source="measured",
            measured=True,
        ),
        "layers": [sample_layers()],
        "advice": [],
        "absent": {},
    }
    return Profile(**(values | changes))


def sample_point(step: float = 0.1, shape: str = "480x832x81", **changes: Any) -> Point:
    """One shape with clips of 1 and 4 steps."""
    clips = [
        ClipLatency(
            steps=steps,
            latency=latency_from_samples(steady_samples(steps * step, 30)),
            frames_per_second=81 / steps / step,
            real_time_factor=81 / 16 / steps / step,
            joules={"RAPL package-0": 5.0 * steps},
        )
        for steps in (1, 4)
    ]
    values: dict[str, Any] = {
        "shape": shape,
        "latents": [1, 21, 16, 60, 104],
        "frames": 81,
        "tokens": 32760,
        "text_tokens": 512,
        "warm_up": Warmup(runs=3, seconds=1.0, steady=True),
        "transition": latency_from_samples(steady_samples(step)),
        "largest_transition": step,
        "enqueue": None,
        "clips": clips,
        "fixed_seconds": 0.0,
        "roofline": Roofline(
            operations={"fp32": 8e9},
            bytes=1e8,
            compute_seconds=0.08,
            memory_seconds=0.005,
            efficiency=0.08 / step,
        ),
    }
    return Point(**(values | changes))


def sample_layers(**rows: float) -> Layers:
    """Shares of operators; Gemm alone without any."""
    found = [
        Layer(name=name, operator=name, seconds=share, share=share, calls=1)
        for name, share in (rows or {"Gemm": 1.0}).items()
    ]
    return Layers(
        source="profiler",
        graph="transition",
        shape="480x832x81",
        transitions=3,
        seconds=1.0,
        overhead=0.01,
        rows=found,
        by_operator=found,
        by_part=found,
    )


def assert_operations_match_graph(bundle: Bundle) -> None:
    """The architecture's operations are those of the exported graph."""
    import onnx_ir

    from anyflow_deploy.export.quantization.precision_report import (
        count_product_flops,
        symbol_sizes,
    )

    a = bundle.manifest.architecture
    video = bundle.manifest.video
    symbols = symbol_sizes(a, video)
    graph = bundle.manifest.graphs["chunk" if a.causal else "transition"]
    total, _ = count_product_flops(onnx_ir.load(bundle.file(graph.file)), symbols)
    shape = (symbols["frames"], video.height // 8, video.width // 8)
    types = compute_types("fp32", "fp32")
    work = transition_cost(
        a, types, shape, symbols["text"], symbols.get("past", 0), with_text=not a.causal
    )
    assert sum(work.operations.values()) == total
