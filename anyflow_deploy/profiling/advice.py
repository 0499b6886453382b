"""Advice in words, each piece with the measurement that it is based on.

A rule is a function from a profile to advice or nothing, and `RULES` is the list. The limits have
names and reasons, so that they can be questioned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from anyflow_deploy.profiling.formatting import format_steps
from anyflow_deploy.profiling.record import Advice, Point, Profile
from anyflow_deploy.profiling.summary_statistics import TAIL_SAMPLES

LAUNCH_SHARE = 0.8
"""Share of a transition that launching may take; above it, trtexec calls engines enqueue-bound."""

VARIATION = 0.025
"""Coefficient of variation above which trtexec advises to lock the clocks."""

CLOCK_SPREAD = 0.02
"""Change of a clock, highest over lowest, that a locked one may show: sensors round."""

DRIFT = 0.05
"""Change of the median between the halves of a measurement; more is heat or another program."""

OTHER_LOAD = 0.1
"""Cores that other programs may use; the system itself uses less."""

LOW_EFFICIENCY = 0.4
"""Share of the ceiling; good engines on large shapes reach more, on CPUs and GPUs."""

SMALL_OPERATORS = 0.3
"""Share of a transition in operators that are no matrix products; fused engines stay below."""

STAGE_SHARE = 0.4
"""Share of the end to end time above which a stage beside the transformer is reported."""


def advise(profile: Profile) -> list[Advice]:
    """Return the advice of all rules, problems first."""
    order = {"problem": 0, "hint": 1, "note": 2}
    results = [advice for rule in RULES for advice in rule(profile)]
    return sorted(results, key=lambda advice: order[advice.weight])


def _check_throttling(profile: Profile) -> Iterator[Advice]:
    for reason, share in profile.conditions.throttle.items():
        yield Advice(
            kind="throttled",
            weight="problem",
            text=(
                "The hardware slowed itself down. Improve cooling or the power limit, or measure"
                " for as long as the model will really run: these times are those of a throttled"
                " machine."
            ),
            measurement=f"{reason}, in {100 * share:.0f} % of the samples",
        )


def _check_drift(profile: Profile) -> Iterator[Advice]:
    for point in profile.points:
        # Transitions of a causal clip differ by design, so whole clips are compared there.
        drift = (point.transition if not point.chunks else point.clips[-1].latency).drift
        if abs(drift) > DRIFT:
            slower = drift > 0
            yield Advice(
                kind="drifting",
                weight="problem",
                text=(
                    "Transitions became slower while they were measured: heat, a lower clock,"
                    " or another program. Measure longer (--seconds), on an idle machine."
                    if slower
                    else (
                        "Transitions became faster while they were measured: the machine was not"
                        " warm, or another program ended. Measure longer (--seconds)."
                    )
                ),
                measurement=(
                    f"{point.shape}: the second half's median is {_percent(drift)} of the first's"
                ),
            )


def _check_other_load(profile: Profile) -> Iterator[Advice]:
    load = profile.conditions.other_load
    if load is not None and load > OTHER_LOAD:
        yield Advice(
            kind="machine busy",
            weight="problem",
            text=(
                "Other programs used the processor at the same time (or the hypervisor withheld"
                " it). Do not compare these times; measure on an idle machine."
            ),
            measurement=(
                f"{load:.2f} cores of {profile.machine.get('cores', '?')} were busy with something"
                " else"
            ),
        )


def _check_variation(profile: Profile) -> Iterator[Advice]:
    for point in profile.points:
        if not point.warm_up.steady:
            yield Advice(
                kind="never steady",
                weight="problem",
                text="Warm-up ended without the times settling. Give it more time with --seconds.",
                measurement=(
                    f"{point.shape}: {point.warm_up.runs} runs in {point.warm_up.seconds:.1f} s"
                ),
            )


_VIRTUAL_NOTE = " A virtual machine sees neither its processor's true clock nor its neighbours."


def _check_clocks(profile: Profile) -> Iterator[Advice]:
    worst = max(profile.points, key=lambda point: point.transition.variation)
    variation = worst.transition.variation
    if profile.subject.kind == "causal" or variation <= VARIATION:  # chunks differ by design
        return
    changes = [
        f"{series.name} {min(values):.0f} to {max(values):.0f} {series.unit}"
        for series in profile.conditions.series
        if series.unit == "MHz"
        for values in [[value for _, value in series.samples]]
        if max(values) > (1 + CLOCK_SPREAD) * min(values)
    ]
    measurement = (
        f"{worst.shape}: coefficient of variation {100 * variation:.1f} % (limit"
        f" {100 * VARIATION:g} %)"
    )
    if changes:
        yield Advice(
            kind="clocks not locked",
            weight="hint",
            text=(
                "Times vary with the clocks. For numbers to compare, lock them: nvidia-smi"
                " --lock-gpu-clocks=MHZ on a card, jetson_clocks on a Jetson, the performance"
                " governor on a processor (cpupower frequency-set -g performance)."
            ),
            measurement=f"{measurement}; {', '.join(changes)}",
        )
        return
    yield Advice(
        kind="times vary",
        weight="hint",
        text=(
            "Times vary, but no clock was seen to change: look for other load, and trust the median"
            " and its interval."
        )
        + _VIRTUAL_NOTE * bool(profile.machine.get("virtual")),
        measurement=measurement,
    )


def _check_governor(profile: Profile) -> Iterator[Advice]:
    governor = profile.machine.get("governor")
    if governor not in (None, "performance") and profile.subject.provider == "cpu":
        yield Advice(
            kind="clocks not locked",
            weight="hint",
            text=(
                "The processor's clock follows its load. cpupower frequency-set -g performance"
                " keeps it high."
            ),
            measurement=f"governor {governor}",
        )
    mode = (profile.machine.get("jetson") or {}).get("power_mode", "MAXN")
    if not str(mode).startswith(("MAXN", "unknown")):
        yield Advice(
            kind="power mode",
            weight="hint",
            text=(
                "The Jetson is limited to a power budget. sudo nvpmodel -m N lifts the limit, if"
                " the board can take the heat; N is the number of MAXN (MAXN_SUPER where there is"
                " one) in /etc/nvpmodel.conf."
            ),
            measurement=f"nvpmodel says {mode}",
        )


def _check_launches(profile: Profile) -> Iterator[Advice]:
    for point in profile.points:
        if (
            point.enqueue is not None
            and point.enqueue.median > LAUNCH_SHARE * point.transition.median
        ):
            yield Advice(
                kind="launch-bound",
                weight="hint",
                text=(
                    "The GPU waits for the processor to launch its work. Use CUDA graphs (weight"
                    " streaming prevents them), a larger batch, or a faster core."
                ),
                measurement=(
                    f"{point.shape}: {_ms(point.enqueue.median)} of {_ms(point.transition.median)}"
                    " are spent on launching"
                ),
            )


def _check_roofline(profile: Profile) -> Iterator[Advice]:
    for point in profile.points:
        roof = point.roofline
        if roof is None or roof.efficiency is None or profile.ceilings is None:
            continue
        if not point.chunks and point.transition.minimum < roof.bound:
            yield Advice(
                kind="ceiling too low",
                weight="hint",
                text=(
                    "A transition was faster than the ceiling, so the ceiling is wrong: its"
                    " measurement was disturbed, or the hardware is not that of the data sheet"
                    " (--target). Profile again on an idle machine."
                ),
                measurement=(
                    f"{point.shape}: {_ms(point.transition.minimum)}; {profile.ceilings.name}:"
                    f" {_ms(roof.bound)}"
                ),
            )
        measurement = (
            f"{point.shape}: {_ms(point.transition.median)} where {profile.ceilings.name} allows"
            f" {_ms(roof.bound)} ({_ms(roof.compute_seconds)} of products,"
            f" {_ms(roof.memory_seconds)} of memory traffic)"
        )
        if roof.memory_seconds > roof.compute_seconds:
            yield Advice(
                kind="memory-bound",
                weight="hint",
                text=(
                    "Reading the weights takes longer than multiplying by them. Fewer bytes help"
                    " (int8, fp8), and so does more work for each read: larger chunks, more frames."
                    " A faster processor would not."
                ),
                measurement=measurement,
            )
        elif roof.efficiency >= LOW_EFFICIENCY:
            yield Advice(
                kind="compute-bound",
                weight="note",
                text=(
                    "Matrix products take most of the time. Fewer steps, a smaller shape or a"
                    " narrower type make it faster; little else does."
                ),
                measurement=f"{measurement}: {100 * roof.efficiency:.0f} % of what is possible",
            )
        if roof.efficiency < LOW_EFFICIENCY:
            yield Advice(
                kind="far from the ceiling",
                weight="hint",
                text=(
                    "Something other than products and weights takes the time: see the table of"
                    " layers, and try another backend (anyflow-build) or a larger shape."
                ),
                measurement=f"{measurement}: {100 * roof.efficiency:.0f} % of what is possible",
            )


_PRODUCT_WORDS = (
    "MatMul", "Gemm", "Attention", "Conv", "gemm", "mha", "matmul", "CaskGemm", "kgen_mha",
)  # fmt: skip


def _check_small_operators(profile: Profile) -> Iterator[Advice]:
    for layers in profile.layers:
        others = [
            row
            for row in layers.by_operator
            if not any(word in row.operator for word in _PRODUCT_WORDS)
        ]
        share = sum(row.share for row in others)
        if share > SMALL_OPERATORS:
            names = ", ".join(f"{row.operator} {100 * row.share:.0f} %" for row in others[:4])
            yield Advice(
                kind="many small operators",
                weight="hint",
                text=(
                    "Much of a transition goes into operators that only move numbers. Compiled"
                    " engines fuse them: try anyflow-build --backend aotinductor (or tensorrt on a"
                    " GPU). In small models and shapes it is always so."
                ),
                measurement=(
                    f"{layers.shape}: {100 * share:.0f} % outside of products and attention"
                    f" ({names})"
                ),
            )


def _check_stages(profile: Profile) -> Iterator[Advice]:
    for row in profile.end_to_end:
        for name, seconds in row.seconds.items():
            if name != "transformer" and seconds > STAGE_SHARE * row.total:
                remedy = (
                    "keep embeddings of prompts that come again (--save-prompt-embeds)."
                    if "text" in name
                    else "decode on the GPU, or smaller; with a causal model, chunk by chunk while"
                    " the next one is made."
                )
                yield Advice(
                    kind=f"the {name} decides",
                    weight="hint",
                    text=f"A faster transformer will not help much here: {remedy}",
                    measurement=f"{row.shape} at {format_steps(row.steps)}:"
                    f" {name} {_ms(seconds)} of {_ms(row.total)}",
                )
                break
        else:
            continue
        return  # once is enough: at the first number of steps it is largest


def _check_real_time(profile: Profile) -> Iterator[Advice]:
    for point in profile.points:
        fast = [clip.steps for clip in point.clips if clip.real_time_factor >= 1]
        if point.chunks:
            fast = [chunks.steps for chunks in point.chunks if chunks.worst_real_time_factor >= 1]
        factors = ", ".join(
            f"{clip.real_time_factor:.3g} in {format_steps(clip.steps)}" for clip in point.clips
        )
        text = (
            f"Frames are generated faster than they play in up to {format_steps(max(fast))}"
            " (latents; the VAE takes further time)."
            if fast
            else "Frames are generated slower than they play at every number of steps measured."
        )
        yield Advice(
            kind="real time",
            weight="note",
            text=text,
            measurement=f"{point.shape}: real-time factor {factors}",
        )


def _check_tails(profile: Profile) -> Iterator[Advice]:
    few = [point for point in profile.points if point.transition.count < TAIL_SAMPLES]
    if few:
        counts = ", ".join(f"{point.shape} {_count(point)}" for point in few)
        yield Advice(
            kind="short tail",
            weight="note",
            text=(
                f"With fewer than {TAIL_SAMPLES} transitions the 99th percentile is about the"
                " slowest one. For a service level, measure longer (--seconds)."
            ),
            measurement=counts,
        )


RULES: tuple[Callable[[Profile], Iterator[Advice]], ...] = (
    _check_throttling,
    _check_drift,
    _check_other_load,
    _check_variation,
    _check_clocks,
    _check_governor,
    _check_launches,
    _check_roofline,
    _check_small_operators,
    _check_stages,
    _check_real_time,
    _check_tails,
)


def _count(point: Point) -> str:
    return f"of {point.transition.count} transitions"


def _percent(change: float) -> str:
    return f"{100 * (1 + change):.0f} %"


def _ms(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"
