"""Fake quantization against arithmetic by hand, the ranking of layers, and how many of them are
kept."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Collection
from pathlib import Path

import pytest
import torch

from anyflow_deploy import AnyFlowError, Schedule, noise, sample
from anyflow_deploy.checkpoints.checkpoint import open_checkpoint
from anyflow_deploy.checkpoints.weights import Weights
from anyflow_deploy.cli.options import parse_options
from anyflow_deploy.cli.sensitivity import SensitivityOptions, sensitivity
from anyflow_deploy.engines.metrics import difference
from anyflow_deploy.export.quantization.calibrate import run_calibration, write_calibration
from anyflow_deploy.export.quantization.fake_quant import FakeQuant
from anyflow_deploy.export.quantization.sensitivity import (
    QuantizationError,
    Sensitivity,
    SensitivityAnalyzer,
    SensitivitySettings,
    load_sensitivity,
    measure_sensitivity,
    select_full_precision_layers,
)
from anyflow_deploy.export.quantization.sensitivity_report import (
    KINDS,
    draw_sensitivity,
    sensitivity_grid,
    sensitivity_tables,
)
from anyflow_deploy.export.torch_engine import TorchEngine
from anyflow_deploy.quantization.calibration import Calibration
from anyflow_deploy.quantization.layers import input_amax, input_channels, quantizable_layers
from tests.conftest import SMALL, Export
from tests.integration.test_calibration import CAUSAL, Changed, settings

SCHEDULE = Schedule.uniform(4)


@pytest.fixture(scope="module")
def weights() -> Weights:
    return open_checkpoint(SMALL)


@pytest.fixture(scope="module")
def calibration(weights: Weights) -> Calibration:
    return run_calibration(weights, settings(weights, prompts=1))


def video(engine: TorchEngine):  # type: ignore[no-untyped-def]
    given = settings(engine_weights := open_checkpoint(SMALL), prompts=1)
    assert engine.architecture == engine_weights.architecture
    return sample(engine, noise((1, *given.shape), 9), given.text.prompt_embeds, SCHEDULE)


def rounded(x: torch.Tensor, amax: torch.Tensor | float, precision: str) -> torch.Tensor:
    """QuantizeLinear and DequantizeLinear, as ONNX defines them."""
    if precision == "int8":
        scale = torch.as_tensor(amax) / 127
        return (x / scale).round().clamp(-128, 127) * scale
    scale = torch.as_tensor(amax) / 448
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


@pytest.mark.parametrize(("precision", "limit"), [("int8", 1e-4), ("fp8", 1e-5)])
@pytest.mark.parametrize("smoothed", [False, True])
def test_it_computes_what_quantize_and_dequantize_nodes_do(
    weights: Weights, calibration: Calibration, precision: str, limit: float, smoothed: bool
) -> None:
    """What is left is float32 sums in another order, and the values they push over a rounding
    border."""
    by_hand = TorchEngine(weights)
    engine = TorchEngine(weights)
    a = weights.architecture
    smooth = {}
    for name in quantizable_layers(a):
        layer = by_hand.network.get_submodule(name)
        s = (
            torch.tensor(input_channels(calibration, name)).sqrt()
            if smoothed
            else torch.ones(layer.weight.shape[1])
        )
        smooth[name] = s
        amax = float((torch.tensor(input_channels(calibration, name)) / s).max())
        matrix = layer.weight * s
        size = matrix.abs().amax(1, keepdim=True) if precision == "int8" else matrix.abs().max()
        layer.weight.copy_(rounded(matrix, size, precision))
        layer.register_forward_pre_hook(
            lambda _, args, s=s, amax=amax: (rounded(args[0] / s, amax, precision),)
        )
        assert smoothed or amax == pytest.approx(input_amax(calibration, name), rel=1e-6)
    FakeQuant(engine.network, a, calibration, precision, smooth=smooth if smoothed else None)
    found = difference(video(engine), video(by_hand))
    assert found.relative_l2 < limit
    assert 3e-4 < difference(video(engine), video(TorchEngine(weights))).relative_l2 < 2e-2


def test_switched_off_it_changes_no_bit_and_layers_switch_one_by_one(
    weights: Weights, calibration: Calibration
) -> None:
    plain, engine = TorchEngine(weights), TorchEngine(weights)
    fake = FakeQuant(
        engine.network,
        weights.architecture,
        calibration,
        "int8",
        quantizable_layers(weights.architecture),
    )
    assert (video(engine) == video(plain)).all()
    fake.quantize_only(["blocks.1.ffn.net.2"])
    alone = video(engine)
    assert not (alone == video(plain)).all()
    fake.keep_layers([name for name in fake.layers if name != "blocks.1.ffn.net.2"])
    assert (video(engine) == alone).all()
    again = FakeQuant(engine.network, weights.architecture, calibration, "fp8")
    assert again.layers == tuple(quantizable_layers(weights.architecture)) and again.excluded == {}


def test_attention_rounds_its_operands_in_fp8(weights: Weights, calibration: Calibration) -> None:
    engine = TorchEngine(weights)
    kept = tuple(quantizable_layers(weights.architecture))
    plain = video(engine)
    FakeQuant(
        engine.network, weights.architecture, calibration, "fp8", kept, attention=("attn1", "attn2")
    )
    assert 1e-4 < difference(video(engine), plain).relative_l2 < 2e-2


def test_refusals(weights: Weights, calibration: Calibration) -> None:
    network = TorchEngine(weights).network
    a = weights.architecture
    for arguments, message in [
        (("fp16",), "precision is 'fp16'; those that round layers to 8 bits are int8 and fp8"),
        (
            ("int8", ["blocks.0.attn1.to_z"]),
            r"'blocks\.0\.attn1\.to_z' is not a layer .* Did you mean 'blocks\.0\.attn1\.to_",
        ),
        (("int8", [], None, ["attn1"]), "int8 attention does not exist beyond 512 tokens"),
    ]:
        with pytest.raises(AnyFlowError, match=message):
            FakeQuant(network, a, calibration, *arguments)  # type: ignore[arg-type]
    silent = {f"blocks.0.attn1.to_v.{part}": torch.zeros_like for part in ("weight", "bias")}
    changed = Changed(weights, silent)
    fake = FakeQuant(
        network, a, run_calibration(changed, settings(changed, prompts=1, steps=(1,))), "int8"
    )
    assert list(fake.excluded) == ["blocks.0.attn1.to_out.0"]
    with pytest.raises(
        AnyFlowError, match=r"blocks\.0\.attn1\.to_out\.0 cannot be quantized \(its input was zero"
    ):
        fake.quantize_only(["blocks.0.attn1.to_out.0"])


def test_outputs_of_a_channel_of_zeros_are_zeros(calibration: Calibration) -> None:
    def quiet(tensor: torch.Tensor) -> torch.Tensor:
        tensor[:2] = 0
        return tensor

    changed = Changed(
        open_checkpoint(SMALL),
        {"blocks.0.ffn.net.2.weight": quiet, "blocks.0.ffn.net.2.bias": quiet},
    )
    network = TorchEngine(changed).network
    FakeQuant(network, changed.architecture, calibration, "int8")
    outputs = network.get_submodule("blocks.0.ffn.net.2")(
        torch.ones(1, changed.architecture.ffn_dim)
    )
    assert (outputs[0, :2] == 0).all() and outputs.isfinite().all()


@pytest.fixture(scope="module")
def outlier() -> tuple[Weights, Calibration]:
    """A model with one layer that 8 bits cannot serve: one of its input channels is a thousand
    times the others."""
    name = "blocks.1.ffn.net.0.proj.bias"

    def loud(bias: torch.Tensor) -> torch.Tensor:
        bias[5] = 1000.0
        return bias

    def deaf(weight: torch.Tensor) -> torch.Tensor:
        weight[:, 5] = 0
        return weight

    weights = Changed(open_checkpoint(SMALL), {name: loud, "blocks.1.ffn.net.2.weight": deaf})
    return weights, run_calibration(weights, settings(weights, prompts=1, steps=(1, 2)))


def probe_of(
    weights: Weights, calibration: Calibration, precision: str = "int8"
) -> SensitivityAnalyzer:
    given = settings(weights, prompts=1)
    return SensitivityAnalyzer(
        weights,
        calibration,
        precision,
        SensitivitySettings(given.text.prompt_embeds, given.shape, (1, 2)),
    )


def test_the_layer_that_suffers_is_found_and_keeping_it_reaches_the_fidelity(
    outlier: tuple[Weights, Calibration],
) -> None:
    probe = probe_of(*outlier)
    found = measure_sensitivity(probe)
    assert next(iter(found.layers)) == "blocks.1.ffn.net.2"
    sizes = [damage.relative_l2 or 0.0 for damage in found.layers.values()]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 3 * sizes[1]
    assert set(found.layers) == set(quantizable_layers(outlier[0].architecture)) and list(
        found.kept
    ) == [0, 1, 2, 4, 8, 16]
    between = (found.kept[0].psnr_db + found.kept[1].psnr_db) / 2  # type: ignore[operator]
    assert select_full_precision_layers(found, min_psnr_db=between, psnr=probe.psnr_all_except) == [
        "blocks.1.ffn.net.2"
    ]
    assert probe.psnr_all_except(["blocks.1.ffn.net.2"]) >= between > probe.psnr_all_except([])
    assert select_full_precision_layers(found, keep_layers=2) == list(found.layers)[:2]


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_causal_model_is_measured_through_its_cache(precision: str) -> None:
    weights = open_checkpoint(CAUSAL)
    probe = probe_of(
        weights, run_calibration(weights, settings(weights, prompts=1, steps=(1,))), precision
    )
    for name in ("blocks.0.attn1.to_v", "blocks.0.attn2.to_k"):
        damage = probe.measure_layer(name)
        assert damage.relative_l2 is not None and 1e-5 < damage.relative_l2 < 1e-1


def ranking(count: int) -> Sensitivity:
    layers = {
        f"blocks.{n}.ffn.net.2": QuantizationError(relative_l2=1.0 / (n + 1), psnr_db=30.0 + n)
        for n in range(count)
    }
    return Sensitivity(
        weights="",
        precision="int8",
        steps=[4],
        shape=[1, 1, 1, 1, 1],
        seed=0,
        layers=layers,
        excluded={},
    )


@pytest.mark.parametrize("needed", [0, 1, 2, 7, 63, 99])
def test_the_bisection_finds_the_fewest(needed: int) -> None:
    asked = []

    def psnr(kept: Collection[str]) -> float:
        asked.append(len(kept))
        return 40.0 if len(kept) >= needed else 20.0

    assert (
        select_full_precision_layers(ranking(100), min_psnr_db=30.0, psnr=psnr)
        == list(ranking(100).layers)[:needed]
    )
    assert len(asked) <= 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give one of --keep-layers N and --min-psnr DB"),
        ({"keep_layers": 1, "min_psnr_db": 30.0}, "give one of --keep-layers N and --min-psnr DB"),
        (
            {"keep_layers": 5},
            "--keep-layers is 5; allowed are 0 to 4, since 5 layers can be quantized",
        ),
        ({"keep_layers": -1}, "--keep-layers is -1"),
        ({"min_psnr_db": 30.0}, "measured with the model's weights"),
        ({"min_psnr_db": math.nan, "psnr": lambda kept: 1.0}, "--min-psnr is nan"),
        (
            {"min_psnr_db": 30.0, "psnr": lambda kept: -math.inf},
            "30 dB cannot be reached with any layer in int8",
        ),
    ],
)
def test_choices_that_make_no_sense(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(AnyFlowError, match=message):
        select_full_precision_layers(ranking(5), **arguments)  # type: ignore[arg-type]


def test_the_report_survives_layers_that_broke_the_video(tmp_path: Path) -> None:
    damages = {
        **ranking(4).layers,
        "blocks.1.attn1.to_q": QuantizationError(relative_l2=None, psnr_db=None),
    }
    damages["blocks.0.attn1.to_k"] = QuantizationError(relative_l2=0.0, psnr_db=None)
    found = ranking(4).model_copy(
        update={"layers": damages, "kept": {0: damages["blocks.1.attn1.to_q"]}}
    )
    cells = sensitivity_grid(found)
    assert cells.shape == (len(KINDS), 4) and cells[0, 1] == math.inf and math.isnan(cells[3, 3])
    draw_sensitivity(found, tmp_path / "s.png", selected_count=1)
    assert (tmp_path / "s.png").stat().st_size > 10_000 and len(sensitivity_tables(found)) == 2


@pytest.mark.parametrize(("given", "value"), [("30dB", 30.0), ("30", 30.0), ("42.5 db", 42.5)])
def test_decibels_may_say_so(given: str, value: float) -> None:
    assert parse_options(SensitivityOptions, ["bundle", f"--min-psnr={given}"]).min_psnr == value


def test_the_command(
    small_bundle: Export,
    calibration: Calibration,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bundle = small_bundle().path
    file = tmp_path / "calibration.json"
    write_calibration(file, calibration)
    words = (
        f"{bundle} --calibration {file} --frames 1 --height 64 --width 64 --steps 1 --keep-layers 2"
        f" --output {tmp_path} --json"
    )
    assert sensitivity(parse_options(SensitivityOptions, shlex.split(words))) == 0
    found = load_sensitivity(tmp_path / "sensitivity.json")
    assert (
        found.precision == "int8"
        and found.shape[-2:] == [8, 8]
        and (tmp_path / "sensitivity.png").is_file()
    )
    said = capsys.readouterr()
    chosen = list(found.layers)[:2]
    sentence = f"2 of 30 layers stay in full precision: {', '.join(chosen)}"
    assert sentence in said.err.replace("\n", "")
    assert json.loads(said.out) == {
        "report": str(tmp_path / "sensitivity.json"),
        "full_precision_layers": chosen,
        **json.loads((tmp_path / "sensitivity.json").read_text()),
    }


def test_the_command_needs_a_calibration_of_these_weights(
    small_bundle: Export, outlier: tuple[Weights, Calibration], tmp_path: Path
) -> None:
    options = f"{small_bundle().path} --output {tmp_path}"
    with pytest.raises(
        AnyFlowError, match=r"calibration\.json does not exist\. Make one: anyflow-calibrate"
    ):
        sensitivity(parse_options(SensitivityOptions, shlex.split(options)))
    write_calibration(tmp_path / "other.json", outlier[1])
    with pytest.raises(AnyFlowError, match="this calibration is of the weights"):
        sensitivity(
            parse_options(
                SensitivityOptions,
                shlex.split(f"{options} --calibration {tmp_path / 'other.json'}"),
            )
        )
    with pytest.raises(AnyFlowError, match="give one of --keep-layers N and --min-psnr DB"):
        parse_options(SensitivityOptions, ["bundle", "--keep-layers", "1", "--min-psnr", "30"])
