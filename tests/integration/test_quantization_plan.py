"""What an 8-bit export refuses, leaves high, and counts; and products of attention in FP8."""

from __future__ import annotations

import dataclasses
import math
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from anyflow_deploy import AnyFlowError, BackendError, Bundle, load_engine
from anyflow_deploy.checkpoints.checkpoint import open_checkpoint
from anyflow_deploy.checkpoints.dtypes import BUNDLE_DTYPES
from anyflow_deploy.checkpoints.random_weights import RandomWeights
from anyflow_deploy.cli.export import ExportOptions
from anyflow_deploy.cli.inspect_bundle import InspectOptions, inspect
from anyflow_deploy.cli.quantize import calibration_of as calibration_of_export
from anyflow_deploy.engines.validation import THRESHOLDS, validate
from anyflow_deploy.export.exporter import ExportSettings, export_bundle, validate_export
from anyflow_deploy.export.quantization.calibrate import (
    CalibrationSettings,
    run_calibration,
    write_calibration,
)
from anyflow_deploy.export.quantization.fake_quant import FakeQuant
from anyflow_deploy.export.quantization.plan import (
    LARGEST,
    QuantizationPlan,
    plan_quantization,
    scale_from_amax,
    smoothquant_factors,
)
from anyflow_deploy.export.quantization.prompts import PROMPTS, random_prompt_embeds
from anyflow_deploy.export.torch_engine import TorchEngine
from anyflow_deploy.models import Architecture
from anyflow_deploy.precision import resolve_precision
from anyflow_deploy.progress import NullProgress
from anyflow_deploy.quantization.calibration import Calibration, TensorRange, load_calibration
from anyflow_deploy.quantization.layers import OPERANDS, quantizable_layers
from anyflow_deploy.shape_ranges import Range
from tests.conftest import CAUSAL, SMALL, calibration_of
from tests.integration.test_calibration import Changed

WIDE_HEADS = Architecture(
    num_attention_heads=3,
    attention_head_dim=32,
    ffn_dim=160,
    num_layers=1,
    in_channels=4,
    out_channels=4,
    text_dim=32,
    freq_dim=32,
    rope_max_seq_len=128,
)
"""One block whose heads fit FP8 attention (the golden ones are of 24 channels)."""
RANGES = {
    "batch": Range(1, 1),
    "frames": Range(1, 2),
    "height": Range(8, 8, 2),
    "width": Range(12, 12, 2),
    "text": Range(40, 40),
}
"""Small, so that the layers weigh more than attention."""


def made_up(a: Architecture, amax: float = 4.0, weights: str = "made up") -> Calibration:
    """Ranges that nobody measured, for what does not depend on them."""
    inputs = {
        f"{layer}.input": TensorRange(amax=amax, channels=[amax] * k)
        for layer, (k, _) in quantizable_layers(a).items()
    }
    names = [
        f"blocks.{n}.{kind}.{o}"
        for n in range(a.num_layers)
        for kind in ("attn1", "attn2")
        for o in OPERANDS
    ]
    return Calibration(
        config=a.as_config(),
        weights=weights,
        prompts=["x"],
        steps=[1],
        seeds=[0],
        shift=5.0,
        shapes=[[1, 1, 4, 8, 8]],
        tools={},
        tensors={**inputs, **{name: TensorRange(amax=1.0) for name in names}},
    )


def changed(calibration: Calibration, **tensors: TensorRange | None) -> Calibration:
    """A calibration with other ranges of some tensors, or without them; `__` stands for a dot."""
    replaced = {
        **calibration.tensors,
        **{name.replace("__", "."): value for name, value in tensors.items()},
    }
    return calibration.model_copy(
        update={"tensors": {name: value for name, value in replaced.items() if value is not None}}
    )


def plan(
    calibration: Calibration,
    weights: Any = None,
    precision: str = "int8",
    base: str = "fp32",
    **how: Any,
) -> QuantizationPlan:
    kept = how.pop("full_precision_layers", ())
    spec = resolve_precision(precision, base, "cpu", **how)
    return plan_quantization(
        weights or open_checkpoint(SMALL), calibration, spec, kept, NullProgress()
    )


@pytest.fixture(scope="module")
def wide() -> tuple[RandomWeights, Calibration]:
    weights = RandomWeights(WIDE_HEADS, "heads of 32 channels")
    text = random_prompt_embeds(weights, PROMPTS[:2], 40)
    return weights, run_calibration(
        weights, CalibrationSettings(text, (2, 4, 8, 12), steps=(1, 2, 4))
    )


@pytest.fixture(scope="module")
def fp8_attention(
    wide: tuple[RandomWeights, Calibration], tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    weights, calibration = wide
    how = ExportSettings(
        "fp8",
        calibration=calibration,
        attention="fp8",
        ranges=RANGES,
        full_precision_layers=("blocks.0.ffn.net.2",),
    )
    return export_bundle(weights, tmp_path_factory.mktemp("fp8") / "bundle", how)


def test_fp8_attention_rounds_both_products(fp8_attention: Bundle) -> None:
    onnx.checker.check_model(str(fp8_attention.path / "transition.onnx"), full_check=True)
    graph = onnx.load(str(fp8_attention.path / "transition.onnx"), load_external_data=False).graph
    maker = {output: node for node in graph.node for output in node.output}
    for kind in ("attn1", "attn2"):
        products = [
            n
            for n in graph.node
            if n.op_type == "MatMul" and n.name.startswith(f"blocks.0.{kind}/")
        ]
        assert len(products) == 2
        operands = [maker[name] for node in products for name in node.input]
        assert {node.op_type for node in operands} == {"DequantizeLinear"}
        rounds = [maker[node.input[0]] for node in operands]
        scales = {node.input[1] for node in rounds}
        assert scales == {f"blocks.0.{kind}.{operand}_scale" for operand in OPERANDS}
        assert maker[rounds[2].input[0]].op_type == "Softmax"
    assert (
        fp8_attention.manifest.quantization is not None
        and fp8_attention.manifest.quantization.attention == "fp8"
    )


def test_fp8_attention_agrees_with_pytorch(
    fp8_attention: Bundle, wide: tuple[RandomWeights, Calibration]
) -> None:
    """Less closely than layers do: a sum that lands beside a border of the FP8 grid is 6 % off, the
    softmax spreads it over all tokens, and the next grids round what was spread. So the middle is
    compared tightly, the worst loosely.
    """
    weights, calibration = wide
    found = []
    for quantized in (True, False):
        reference = TorchEngine(weights)
        if quantized:
            FakeQuant(
                reference.network,
                WIDE_HEADS,
                calibration,
                "fp8",
                ("blocks.0.ffn.net.2",),
                attention=("attn1", "attn2"),
            )
        engine: Any = load_engine(fp8_attention)
        result = validate(engine, reference, "fp8", (1, 2, 4, 8, 12), (1, 40, 32), steps=(1, 4))
        found.append(
            sorted(item.difference.relative_l2 for item in (*result.transitions, *result.rollouts))
        )
    rounding, all_of_it = found
    assert rounding[len(rounding) // 2] < 1e-3
    assert rounding[-1] < 0.4 * all_of_it[-1]
    assert all_of_it[-1] < THRESHOLDS["fp8"].transition


def test_the_share_is_what_a_formula_says(
    fp8_attention: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    a = WIDE_HEADS
    achieved = fp8_attention.manifest.achieved
    video = fp8_attention.manifest.video
    frames, tokens, text, d = 2, 2 * 4 * 6, 40, a.inner_dim
    assert (video.frames, video.height, video.width, video.text_tokens) == (5, 64, 96, text)
    # Attn1 4, attn2 2 and 2 of the text, ffn's first
    linear = 6 * tokens * d * d + 2 * text * d * d + tokens * d * a.ffn_dim
    attention = 2 * tokens * tokens * d + 2 * tokens * text * d
    kept = tokens * a.ffn_dim * d
    patch = a.in_channels * 4
    times = 2 * (a.freq_dim * d + d * d) * frames + frames * d * 6 * d
    rest = 2 * tokens * patch * d + text * (a.text_dim * d + d * d) + times
    share = (linear + attention) / (linear + attention + kept + rest)
    assert achieved.quantized_flops == pytest.approx(share, abs=6e-5)
    narrow = 8 * d * d + d * a.ffn_dim
    assert achieved.weight_bytes["F8_E4M3"] == narrow + 1  # and the zero point
    assert achieved.quantized_weights == round(
        (narrow + 1) / sum(achieved.weight_bytes.values()), 4
    )
    assert achieved.full_precision_layers == {"blocks.0.ffn.net.2": "asked for"}
    assert inspect(InspectOptions(bundle=fp8_attention.path)) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        f"{share:.1%} of the products' operations, {achieved.quantized_weights:.1%} of the weights"
        in printed
    )
    assert "fp32; attention fp8" in printed and "blocks.0.ffn.net.2 │ asked for" in printed


@pytest.mark.parametrize(
    ("tensors", "kept", "reason"),
    [
        (
            {"blocks__1__attn1__to_out__0__input": TensorRange(amax=0.0, channels=[0.0] * 96)},
            {"blocks.1.attn1.to_out.0"},
            "its input was zero throughout calibration",
        ),
        ({}, {"blocks.0.attn1.to_k", "blocks.2.ffn.net.0.proj"}, "asked for"),
    ],
)
def test_layers_that_stay_high_are_in_the_manifest(
    tensors: dict[str, TensorRange], kept: set[str], reason: str, tmp_path: Path
) -> None:
    """And compute what the untouched ones do, though smoothing changes the norm that they read
    through."""
    calibration = changed(calibration_of(SMALL), **tensors)
    weights = open_checkpoint(SMALL)
    asked = tuple(sorted(kept)) if reason == "asked for" else ()
    bundle = export_bundle(
        weights,
        tmp_path / "bundle",
        ExportSettings("int8", calibration=calibration, full_precision_layers=asked),
    )
    assert bundle.manifest.achieved.full_precision_layers == dict.fromkeys(kept, reason)
    held = {
        t.name: t
        for t in onnx.load(
            str(bundle.path / "transition.onnx"), load_external_data=False
        ).graph.initializer
    }
    assert {
        n for n, t in held.items() if n.endswith("weight") and t.data_type == onnx.TensorProto.INT8
    } == {
        f"{layer}.weight" for layer in quantizable_layers(weights.architecture) if layer not in kept
    }
    reference = TorchEngine(weights)
    engine = load_engine(bundle)
    factors = plan(calibration, full_precision_layers=asked).smooth
    FakeQuant(reference.network, weights.architecture, calibration, "int8", asked, smooth=factors)
    found = validate(engine, reference, "int8", (1, 2, 4, 8, 12), (1, 40, 32), steps=(1,))  # type: ignore[arg-type]
    assert max(item.difference.relative_l2 for item in (*found.transitions, *found.rollouts)) < 1e-3


def test_silent_channels_are_not_smoothed(tmp_path: Path) -> None:
    """Zeros in an activation's channel, in a weight's column and in a weight's row: s = 1, no NaN,
    a scale that divides."""
    first = "blocks.0.ffn.net.0.proj"
    calibration = calibration_of(SMALL)
    channels = list(calibration.tensors[f"{first}.input"].channels or [])
    channels[:2] = [0.0, 0.0]
    calibration = changed(
        calibration,
        **{f"{first}.input".replace(".", "__"): TensorRange(amax=max(channels), channels=channels)},
    )

    def quiet(tensor: torch.Tensor) -> torch.Tensor:
        tensor[:, 5] = 0
        tensor[7] = 0
        return tensor

    weights = Changed(open_checkpoint(SMALL), {f"{first}.weight": quiet})
    found = plan(calibration, weights)
    s = found.smooth[first]
    assert (
        s[[0, 1, 5]].tolist() == [1, 1, 1]
        and bool(s.isfinite().all())
        and float((s != 1).sum()) > 80
    )
    assert all(bool(value.float().isfinite().all()) for value in found.constants.values())
    stored = found.convert_parameter(f"{first}.weight", weights.read(f"{first}.weight"), "I8")
    assert not stored[7].any() and not stored[:, 5].any() and stored.abs().max() == 127


def test_smoothing_is_the_papers() -> None:
    s = smoothquant_factors(
        torch.tensor([16.0, 4.0, 0.0, 1e12, 1e-12]), torch.tensor([1.0, 0.25, 1.0, 1.0, 1.0])
    )
    assert s.tolist() == pytest.approx([4.0, 4.0, 1.0, 1e3, 1e-3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["I8", "F8_E4M3"])
def test_scales_never_clip_nor_waste(dtype: torch.dtype, kind: str) -> None:
    amax = torch.cat((torch.logspace(-1, 4, 2000), torch.tensor([0.0, 1e-30])))
    scale = scale_from_amax(amax, kind, dtype).float()
    assert bool((scale * LARGEST[kind] >= amax).all()) and bool((scale > 0).all())
    smallest = torch.finfo(dtype).tiny
    step = torch.finfo(dtype).eps
    assert bool(
        (
            scale <= torch.maximum(amax / LARGEST[kind] * (1 + 1.5 * step), torch.tensor(smallest))
        ).all()
    )


def test_layers_of_odd_widths_stay_high() -> None:
    a = dataclasses.replace(WIDE_HEADS, ffn_dim=200)
    found = plan(made_up(a), RandomWeights(a, "odd"))
    assert found.full_precision_layers == {
        "blocks.0.ffn.net.0.proj": "96 to 200 channels: not multiples of 16",
        "blocks.0.ffn.net.2": "200 to 96 channels: not multiples of 16",
    }
    assert len(found.inputs) == 8


def test_a_base_of_16_bits_has_scales_of_16_bits() -> None:
    for base, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        found = plan(calibration_of(SMALL), base=base)
        scales = {
            name: value.dtype for name, value in found.constants.items() if name.endswith("_scale")
        }
        assert set(scales.values()) == {dtype}
        assert {v.dtype for n, v in found.constants.items() if n.endswith("_smooth")} == {
            torch.float32
        }


WHOLE = tuple(quantizable_layers(WIDE_HEADS))
NARROW = dataclasses.replace(WIDE_HEADS, num_attention_heads=4, attention_head_dim=24)
SILENT = {f"blocks__0__{kind}__value": TensorRange(amax=0.0) for kind in ("attn1", "attn2")}


@pytest.mark.parametrize(
    ("settings", "architecture", "message"),
    [
        (
            ExportSettings("int8", full_precision_layers=WHOLE),
            WIDE_HEADS,
            "int8 would quantize nothing: asked for. Choose --precision fp32",
        ),
        (
            ExportSettings("fp8", full_precision_layers=("blocks.0.attn1.toq",)),
            WIDE_HEADS,
            "no layer that is quantized.*mean 'blocks.0.attn1.to_q'",
        ),
        (
            ExportSettings("fp8", attention="fp8"),
            NARROW,
            "attention fp8 would quantize nothing: heads of 24 channels: not a mult",
        ),
        (
            ExportSettings("fp8", attention="fp8", opset=23),
            WIDE_HEADS,
            "attention is fp8 at opset 23; allowed is opset 20",
        ),
        (
            ExportSettings("int8", attention="fp8"),
            WIDE_HEADS,
            "attention is fp8 at precision int8; it goes with precision fp8 only",
        ),
        (
            ExportSettings("fp8", attention="int8"),
            WIDE_HEADS,
            "attention is 'int8'; allowed are high and fp8",
        ),
        (
            ExportSettings("fp16"),
            WIDE_HEADS,
            "precision fp16 quantizes nothing, so calibration would have no effect",
        ),
        (
            ExportSettings("int8", base="int8"),
            WIDE_HEADS,
            "base is 'int8'; allowed are fp32, fp16, bf16",
        ),
    ],
)
def test_settings_that_cannot_be(
    settings: ExportSettings, architecture: Architecture, message: str, tmp_path: Path
) -> None:
    weights = RandomWeights(architecture, "one block")
    with pytest.raises(AnyFlowError, match=message):
        export_bundle(
            weights, tmp_path / "bundle", dataclasses.replace(settings, calibration=own(weights))
        )
    assert list(tmp_path.iterdir()) == []


def own(weights: RandomWeights) -> Calibration:
    """Made-up ranges under the weights' true fingerprint."""
    return made_up(weights.architecture, weights=weights.fingerprint)


class CountedWeights(RandomWeights):
    """Weights that count how often each parameter is read."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__(architecture, "one block")
        self.reads: Counter[str] = Counter()

    def read(self, name: str) -> torch.Tensor:
        self.reads[name] += 1
        return super().read(name)


def test_an_export_takes_the_fingerprint_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = CountedWeights(WIDE_HEADS)
    path = tmp_path / "calibration.json"
    write_calibration(path, own(RandomWeights(WIDE_HEADS, "one block")))
    options = ExportOptions(model="tiny", precision="int8", calibration=path)
    calibration = calibration_of_export(options, weights, tmp_path / "bundle", NullProgress())
    assert set(weights.reads) == set(weights.shapes()) and set(weights.reads.values()) == {1}

    def stop(*_: object) -> None:
        raise AnyFlowError("that was all before the graph")

    monkeypatch.setattr("anyflow_deploy.export.exporter.translate_graph", stop)
    with pytest.raises(AnyFlowError, match="that was all"):
        export_bundle(weights, tmp_path / "bundle", ExportSettings("int8", calibration=calibration))
    layers = {f"{layer}.weight" for layer in quantizable_layers(WIDE_HEADS)}
    assert {name for name, count in weights.reads.items() if count > 1} <= layers  # for SmoothQuant


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: None, "precision int8 needs a calibration. Make one with anyflow-calibrate"),
        (
            lambda c: c.model_copy(update={"weights": "0" * 64}),
            "is of the weights 000000000000…, and one block holds",
        ),
        (
            lambda c: c.model_copy(update={"config": {**c.config, "ffn_dim": 320}}),
            "of another architecture than the weights: ffn_dim 320 against 160",
        ),
        (
            lambda c: changed(c, blocks__0__attn2__to_v__input=None),
            r"the calibration has no range of blocks\.0\.attn2\.to_v\.input",
        ),
    ],
)
def test_calibrations_that_do_not_fit(
    change: Callable[[Calibration], Calibration | None], message: str, tmp_path: Path
) -> None:
    weights = RandomWeights(WIDE_HEADS, "one block")
    with pytest.raises(AnyFlowError, match=message):
        export_bundle(
            weights, tmp_path / "bundle", ExportSettings("int8", calibration=change(own(weights)))
        )
    assert list(tmp_path.iterdir()) == []


def test_missing_operands_are_named(tmp_path: Path) -> None:
    weights = RandomWeights(WIDE_HEADS, "one block")
    calibration = changed(own(weights), blocks__0__attn2__key=None)
    with pytest.raises(AnyFlowError, match=r"no range of blocks\.0\.attn2\.key"):
        export_bundle(
            weights,
            tmp_path / "bundle",
            ExportSettings("fp8", calibration=calibration, attention="fp8"),
        )


def test_a_silent_attention_stays_high() -> None:
    weights = RandomWeights(WIDE_HEADS, "one block")
    one = changed(own(weights), blocks__0__attn2__value=TensorRange(amax=0.0))
    found = plan(one, weights, "fp8", attention="fp8")
    assert found.attentions == ["blocks.0.attn1"] and found.full_precision_layers == {
        "blocks.0.attn2": "value was zero throughout calibration"
    }
    with pytest.raises(AnyFlowError, match="attention fp8 would quantize nothing: value was zero"):
        plan(changed(own(weights), **SILENT), weights, "fp8", attention="fp8")


def test_infinite_ranges_in_a_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    write_calibration(path, made_up(WIDE_HEADS))
    path.write_text(
        re.sub(r'("blocks.0.attn1.query":\{"amax":)1.0', r"\1Infinity", path.read_text())
    )
    with pytest.raises(
        AnyFlowError, match=r"is damaged at 'tensors\.blocks\.0\.attn1\.query\.amax'"
    ):
        load_calibration(path)


def test_targets_without_fp8_are_offered_int8() -> None:
    with pytest.raises(
        BackendError,
        match=r"fp8 does not run on target 'orin' .*Choose --precision int8, or a target that",
    ):
        validate_export(
            open_checkpoint(SMALL),
            ExportSettings("fp8", target="orin", calibration=calibration_of(SMALL)),
        )


def test_both_kinds_quantize_the_same_layers() -> None:
    for checkpoint in (SMALL, CAUSAL):
        found = plan(calibration_of(checkpoint), open_checkpoint(checkpoint))
        assert list(found.inputs) != [] and set(found.inputs) == set(
            quantizable_layers(open_checkpoint(checkpoint).architecture)
        )


_STREAMING = """
import resource, sys, tempfile
from pathlib import Path
from anyflow_deploy.export.exporter import ExportSettings, export_bundle
from anyflow_deploy.export.quantization.plan import plan_quantization
from anyflow_deploy.checkpoints.random_weights import RandomWeights
from anyflow_deploy.export.trace import ParameterSpec
from anyflow_deploy.checkpoints.weights import write_weights
from anyflow_deploy.bundle.bundle import BundleWriter
from anyflow_deploy.precision import PrecisionSpec
from anyflow_deploy.progress import NullProgress
from tests.integration.test_quantization_plan import LARGE, made_up

def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
weights = RandomWeights(LARGE, "large")
calibration = made_up(LARGE)
base = {name: ParameterSpec("F32", shape) for name, shape in weights.shapes().items()}
weights.read("blocks.0.ffn.net.2.weight") * 2
before = peak()
spec, progress = PrecisionSpec("int8", "fp32", smooth=True), NullProgress()
plan = plan_quantization(weights, calibration, spec, (), progress)
with tempfile.TemporaryDirectory() as folder, BundleWriter(Path(folder) / "b", False) as writer:
    parameters = plan.convert_specs(base)
    write_weights(writer, weights, parameters, plan.constants, progress, plan.convert_parameter)
print(peak() - before)
"""
LARGE = Architecture(
    num_attention_heads=8,
    attention_head_dim=128,
    ffn_dim=4096,
    num_layers=6,
    text_dim=64,
    freq_dim=32,
)


def test_quantizing_holds_a_few_matrices_at_a_time() -> None:
    """400 MB of weights: measured and written in a fraction of that."""
    size = 4 * sum(math.prod(shape) for shape in RandomWeights(LARGE, "large").shapes().values())
    assert size > 400e6
    done = subprocess.run(
        [sys.executable, "-c", _STREAMING],
        cwd=SMALL.parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 120, "MiB"


def test_stored_types_have_a_largest_value() -> None:
    assert all(
        float(torch.tensor(top).to(BUNDLE_DTYPES[kind]).float()) == top
        for kind, top in LARGEST.items()
    )


def test_a_smoothed_value_keeps_rows_that_a_float16_scale_can_hold() -> None:
    """Smoothing divides the rows of `to_v`; a row below 127 times float16's smallest normal number
    would lose levels."""
    calibration = calibration_of(SMALL)
    weights = open_checkpoint(SMALL)
    output = "blocks.0.attn1.to_out.0"
    value = "blocks.0.attn1.to_v.weight"
    loud = [4e3] * 96  # s near its limit: every row would be divided by hundreds
    calibration = changed(
        calibration, **{f"{output}.input".replace(".", "__"): TensorRange(amax=4e3, channels=loud)}
    )
    for base, held in (("fp16", True), ("fp32", False)):
        found = plan(calibration, weights, base=base)
        rows = found.apply_factors(value, weights.read(value)).abs().amax(1)
        assert bool((rows >= 127 * torch.finfo(torch.float16).tiny * 0.999).all()) is held
        stored = found.convert_parameter(value, weights.read(value), "I8")
        assert bool((stored.abs().amax(1) >= 126).all())


@pytest.mark.parametrize(("precision", "attention"), [("int8", "high"), ("fp8", "fp8")])
def test_ranges_that_overflow_the_base_are_refused(precision: str, attention: str) -> None:
    weights = RandomWeights(WIDE_HEADS, "one block")
    name = "blocks.0.ffn.net.2.input" if attention == "high" else "blocks.0.attn2.key"
    channels = [1e5] * WIDE_HEADS.ffn_dim if attention == "high" else None
    loud = changed(
        own(weights), **{name.replace(".", "__"): TensorRange(amax=1e5, channels=channels)}
    )
    with pytest.raises(
        AnyFlowError,
        match=r"reached 1e\+05 in calibration, more than fp16 holds \(65504\)\. Choose --base bf16",
    ):
        plan(loud, weights, precision, "fp16", attention=attention)
    assert plan(loud, weights, precision, "fp32", attention=attention).inputs


@pytest.mark.parametrize("channels", [[4.0] * 7, None])
def test_ranges_of_other_channels_are_refused(channels: list[float] | None) -> None:
    weights = RandomWeights(WIDE_HEADS, "one block")
    other = changed(
        own(weights), blocks__0__attn1__to_k__input=TensorRange(amax=4.0, channels=channels)
    )
    with pytest.raises(
        AnyFlowError,
        match=rf"has ranges of {len(channels or ())} channels for blocks.0.attn1.to_k.input, which",
    ):
        validate_export(weights, ExportSettings("int8", calibration=other))
