"""Memory before work: the parameters are the real ones, the sums are the parts, the advice
holds."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex

import pytest

from anyflow_deploy import MODELS, Bundle
from anyflow_deploy.cli.fit import FitOptions, default_shape, fit, show_fit
from anyflow_deploy.cli.options import parse_options
from anyflow_deploy.errors import AnyFlowError
from anyflow_deploy.memory.estimate import (
    FIT_PRECISIONS,
    LatentShape,
    available_memory,
    estimate_memory,
    shape_from_pixels,
    weight_bytes,
)
from anyflow_deploy.memory.parameter_shapes import count_parameters, parameter_shapes, storage_kind
from anyflow_deploy.models import Architecture
from anyflow_deploy.shape_ranges import Range
from anyflow_deploy.targets import TARGETS

H100, CPU = TARGETS["h100"], TARGETS["cpu"]


def run(line: str) -> int:
    return fit(parse_options(FitOptions, shlex.split(line)))


# Parameters


def made(a: Architecture) -> dict[str, tuple[int, ...]]:
    """The parameters of the module itself."""
    import torch

    from anyflow_deploy.model.causal import ChunkTransition
    from anyflow_deploy.model.transformer import FlowMapTransformer

    with torch.device("meta"):
        network = (ChunkTransition if a.causal else FlowMapTransformer)(a)
    return {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}


@pytest.mark.parametrize("model", MODELS)
def test_parameters_are_those_of_the_network(model: str) -> None:
    a = MODELS[model].architecture
    assert parameter_shapes(a) == made(a)
    assert sum(count_parameters(a).values()) == sum(
        math.prod(s) for s in parameter_shapes(a).values()
    )


def test_parameters_follow_the_variants_of_the_architecture() -> None:
    a = dataclasses.replace(
        MODELS["tiny"].architecture,
        cross_attn_norm=False,
        patch_size=(1, 4, 4),
        in_channels=8,
        out_channels=8,
    )
    assert parameter_shapes(a) == made(a)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("model", ["tiny", "far-tiny"])
def test_kinds_are_the_types_the_network_stores(model: str, precision: str) -> None:
    import torch

    from anyflow_deploy.model.causal import ChunkTransition
    from anyflow_deploy.model.transformer import FlowMapTransformer

    a = MODELS[model].architecture
    wanted = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    with torch.device("meta"):
        network = (ChunkTransition if a.causal else FlowMapTransformer)(a, wanted)
    for name, parameter in network.named_parameters():
        assert parameter.dtype == (torch.float32 if storage_kind(name) == "float32" else wanted), (
            name
        )


def test_weights_are_the_bytes_of_a_bundle(tiny_bundle: Bundle) -> None:
    stored = sum(tiny_bundle.manifest.achieved.weight_bytes.values())
    assert weight_bytes(MODELS["tiny"].architecture, "fp32", H100) == pytest.approx(
        stored, rel=0.05
    )


def test_eight_bits_shrink_the_blocks_only() -> None:
    a = MODELS["14b"].architecture
    half = weight_bytes(a, "fp16", H100)
    eight = weight_bytes(a, "fp8", H100)
    assert half - eight == pytest.approx(count_parameters(a)["blocks"], rel=0.01)
    assert weight_bytes(a, "int8", H100) == eight
    assert weight_bytes(a, "int8", CPU) > weight_bytes(a, "int8", H100)  # the rest is float32 there


# Needs


@pytest.mark.parametrize(
    ("layers", "ffn", "precision", "shape", "measured"),
    [
        (2, 8960, "fp32", LatentShape(5, 30, 52), 341e6),
        (2, 8960, "fp32", LatentShape(9, 60, 104), 2268e6),
        (2, 8960, "fp16", LatentShape(5, 60, 104), 2627e6),
        (2, 512, "fp32", LatentShape(5, 30, 52), 230e6),
        (6, 512, "fp32", LatentShape(5, 30, 52), 262e6),
    ],
)
def test_activations_are_near_what_was_measured_and_not_below(
    layers: int, ffn: int, precision: str, shape: LatentShape, measured: float
) -> None:
    """Peaks of ONNX Runtime at 1.3B width, see docs/how-to/fit.md."""
    a = dataclasses.replace(MODELS["1.3b"].architecture, num_layers=layers, ffn_dim=ffn)
    need = estimate_memory(a, precision, CPU, shape)
    assert measured <= need.activations * 1.15 <= 1.25 * measured


@pytest.mark.parametrize("precision", FIT_PRECISIONS)
@pytest.mark.parametrize("model", ["1.3b", "14b", "far-14b"])
def test_more_video_needs_more(model: str, precision: str) -> None:
    a = MODELS[model].architecture
    small, large = (
        estimate_memory(a, precision, H100, LatentShape(frames, 60, 104)) for frames in (9, 21)
    )
    assert small.total < large.total
    assert small.weights == large.weights
    assert large.total == large.weights + large.activations + large.cache + large.workspace
    assert large.score_table > large.activations


def test_a_causal_model_counts_its_cache_and_a_window_shrinks_it() -> None:
    a = MODELS["far-14b"].architecture
    shape = LatentShape(101, 60, 104)
    whole = estimate_memory(a, "fp16", H100, shape)
    window = estimate_memory(a, "fp16", H100, shape, window=2)
    assert 0 < window.cache < whole.cache
    assert estimate_memory(MODELS["14b"].architecture, "fp16", H100, shape).cache == 0


def test_shapes_are_read_and_refused() -> None:
    a = MODELS["14b"].architecture
    assert shape_from_pixels("480x832x81", a) == LatentShape(21, 60, 104) == default_shape("14b")
    assert str(LatentShape(21, 60, 104)) == "480x832x81"
    for text, message in (
        ("480x832", "HEIGHTxWIDTHxFRAMES"),
        ("480x832x80", "nearest is 81"),
        ("481x832x81", "multiples of 16"),
    ):
        with pytest.raises(AnyFlowError, match=message):
            shape_from_pixels(text, a)


# The command


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("--model 1.3b", 0),
        ("--model 14b --precision int8 --target orin", 0),
        ("--model 14b --precision fp16 --target l4", 1),
        ("--model far-14b --precision fp32 --target orin", 1),
        ("--model 14b --target l4", 1),
        ("--model 14b --precision int8 --target orin --memory 32", 0),
        ("--model 1.3b --precision fp32 --target orin-nano", 1),
    ],
)
def test_the_exit_status_is_the_verdict(
    line: str, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(line) == status
    assert "GB" in "".join(capsys.readouterr())


def test_the_overview_has_every_target_and_precision(capsys: pytest.CaptureFixture[str]) -> None:
    run("--model 14b")
    out = capsys.readouterr().out
    assert not [name for name in (*TARGETS, *FIT_PRECISIONS) if name not in out]
    assert "refused" in out


def test_json_holds_the_same_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--model 14b --json") == 0
    report = json.loads(capsys.readouterr().out)
    cell = report["targets"]["h100"]["fp8"]
    assert (
        cell["fits"]
        and cell["total"]
        == estimate_memory(MODELS["14b"].architecture, "fp8", H100, LatentShape(21, 60, 104)).total
    )
    assert report["targets"]["orin"]["fp8"] == {"fits": False, "refused": "orin does not run fp8"}
    assert report["shape"] == "480x832x81"


def test_what_does_not_fit_is_told_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    run("--model 14b --precision fp16 --target rtx5090")
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "does not fit" in said
        and "--precision fp8 at 480x832x81" in said
        and "--target orin or thor" in said
    )


def test_a_window_is_advised_where_the_cache_is_too_large(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run("--model far-1.3b --precision fp16 --target l4 --shape 480x832x1601")
    assert "a window of 8 chunks" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--model 14b --precision fp9", "unknown precision 'fp9'.*Did you mean 'fp8'"),
        ("--model 13b", "unknown model '13b'"),
        ("--model 14b --target mars", "unknown target 'mars'"),
        ("--model 14b --shape x", "HEIGHTxWIDTHxFRAMES"),
        ("--model 14b --window 2", "causal"),
        ("--model 14b --memory 8", "give --target NAME with it"),
        ("--model 14b --target orin --memory 0", "memory"),
        ("--model far-14b --shape 480x848x81", "multiples of 32"),
    ],
)
def test_mistakes_are_refused_before_work(line: str, message: str) -> None:
    with pytest.raises(AnyFlowError, match=message):
        parse_options(FitOptions, shlex.split(line))


# Before an export


def shown(
    a: Architecture, target: str, ranges: dict[str, Range], capsys: pytest.CaptureFixture[str]
) -> str:
    show_fit(a, "fp16", target, ranges)
    return " ".join(capsys.readouterr().err.split())


def test_an_export_says_what_it_will_need_and_warns(capsys: pytest.CaptureFixture[str]) -> None:
    a = MODELS["14b"].architecture
    assert "needs about" in shown(a, "h200", {}, capsys)
    assert "warning" not in shown(a, "h200", {}, capsys)
    assert "warning: that does not fit NVIDIA L4 24GB." in shown(a, "l4", {}, capsys)


def test_an_export_is_judged_by_its_largest_declared_shape(
    capsys: pytest.CaptureFixture[str],
) -> None:
    a = MODELS["1.3b"].architecture
    assert "at 480x832x161" in shown(a, "h100", {"frames": Range(1, 41)}, capsys)
    assert "at 480x832x81" in shown(a, "h100", {"frames": Range(1, None)}, capsys)
    far = MODELS["far-1.3b"].architecture
    assert "at 480x832x81" in shown(far, "h100", {"frames": Range(1, 3)}, capsys)  # of a chunk


def test_another_variant_of_a_device() -> None:
    """The system's share is that of the row, or a third of little memory."""
    for line, available in (
        ("orin --memory 32", 26e9),
        ("orin-nano --memory 4", 4e9 * 2 / 3),
        ("orin-nano", 5.5e9),
    ):
        device = parse_options(FitOptions, shlex.split(f"--model 1.3b --target {line}")).device
        assert device is not None and available_memory(device) == pytest.approx(available)


def test_memory_of_the_cpu_is_this_machines() -> None:
    assert available_memory(CPU) > 10**9
    assert available_memory(TARGETS["orin"]) < 64 * 10**9
