"""`anyflow-export --precision int8` from the command line: it calibrates by itself, chooses,
checks, and refuses."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from anyflow_deploy import AnyFlowError, load_bundle
from anyflow_deploy.checkpoints.random_weights import RandomWeights
from anyflow_deploy.cli.export import ExportOptions, export
from anyflow_deploy.cli.options import parse_options
from anyflow_deploy.cli.quantize import choose_full_precision_layers
from anyflow_deploy.cli.sensitivity import SensitivityOptions, sensitivity
from anyflow_deploy.export.quantization.calibrate import write_calibration
from anyflow_deploy.precision import PrecisionSpec
from anyflow_deploy.progress import NullProgress
from anyflow_deploy.quantization.calibration import load_calibration
from tests.conftest import SMALL, calibration_of
from tests.integration.test_quantization_plan import WIDE_HEADS, made_up


def run_export(words: str) -> int:
    return export(parse_options(ExportOptions, shlex.split(words)))


def test_it_calibrates_by_itself_and_ends_with_valid(
    tiny_pipeline: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "prompts.txt").write_text("a red fox\n")
    monkeypatch.chdir(tmp_path)
    words = f"--checkpoint {tiny_pipeline} --precision int8 --output tiny-int8"
    assert run_export(f"{words} --prompts prompts.txt") == 0
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "calibrating on the CPU" in said
        and "valid: ONNX Runtime" in said
        and "NOT VALID" not in said
    )
    bundle = load_bundle(tmp_path / "tiny-int8", verify=True)
    assert bundle.manifest.quantization is not None and bundle.manifest.quantization.base == "fp32"
    assert load_calibration(bundle.path / "calibration.json").prompts == ["a red fox"]
    report = json.loads((bundle.path / "validation.json").read_text())
    assert report["precision"] == "int8" and report["passed"]
    with pytest.raises(AnyFlowError, match="tiny-int8 exists"):
        run_export(words)


@pytest.mark.parametrize("choice", ["--keep-layers 2", "--min-psnr 30dB"])
def test_it_chooses_what_stays_high_and_sensitivity_reads_the_bundles_own_ranges(
    choice: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_calibration(tmp_path / "c.json", calibration_of(SMALL))
    bundle = tmp_path / "bundle"
    words = (
        f"--checkpoint {SMALL} --precision int8 --calibration {tmp_path / 'c.json'} {choice}"
        f" --output {bundle}"
    )
    assert run_export(f"{words} --check none") == 0
    said = "".join(capsys.readouterr().err.split())
    kept = load_bundle(bundle).manifest.achieved.full_precision_layers
    assert len(kept) == 2 if choice == "--keep-layers 2" else len(kept) < 30
    assert f"{len(kept)}of30layersstayinfp32:" in said and all(layer in said for layer in kept)
    assert set(kept.values()) <= {"asked for"}
    if choice == "--keep-layers 2":
        options = f"{bundle} --frames 1 --height 64 --width 64 --steps 1 --keep-layers 2"
        assert sensitivity(parse_options(SensitivityOptions, shlex.split(options))) == 0
        assert (bundle / "sensitivity.json").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--precision fp8 --target orin",
            r"fp8 does not run on target 'orin'.*Choose --precision int8",
        ),
        (
            "--precision fp16 --calibration c.json",
            "--calibration is for --precision int8 or fp8, and fp16 is not 8-bit",
        ),
        ("--keep-layers 2", "--keep-layers is for --precision int8 or fp8, and fp32 is not 8-bit"),
        ("--no-smoothquant", "--no-smoothquant is for --precision int8 or fp8"),
        ("--precision fp16 --base fp32", "--base is for --precision int8 or fp8"),
        (
            "--precision int8 --keep-layers 2 --min-psnr 30dB",
            "give one of --keep-layers N and --min-psnr DB",
        ),
        (
            "--precision int8 --calibration c.json --prompts p.txt",
            "--calibration has its own prompts; leave --prompts out",
        ),
        ("--precision fp8 --attention int8", "attention is 'int8'; allowed are high and fp8"),
        ("--precision fp8 --no-smoothquant", "--no-smoothquant is for int8; fp8 is never smoothed"),
        ("--precision int8 --base fp8", "base is 'fp8'; allowed are fp32, fp16, bf16"),
        ("--precision int8 --base bf16", "bf16 does not run on target 'cpu'"),
        ("--precision int8 --keep-layers -1", "--keep-layers"),
        ("--precision int8 --min-psnr 0", "--min-psnr"),
        ("--precision int4", "unknown precision 'int4'.*Did you mean 'int8'"),
    ],
)
def test_flags_that_do_not_go_together(words: str, message: str) -> None:
    with pytest.raises(AnyFlowError, match=message):
        parse_options(ExportOptions, ["--model", "tiny", *shlex.split(words)])


def test_choosing_layers_starts_only_with_ranges_of_these_weights_and_a_number_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measuring takes hours on a large model: what it would be refused for afterwards is refused
    before."""
    monkeypatch.setattr(
        "anyflow_deploy.cli.quantize.make_analyzer",
        lambda *a, **k: pytest.fail("measured before checking"),
    )
    calibration = calibration_of(SMALL)
    write_calibration(tmp_path / "c.json", calibration)
    words = (
        f"--checkpoint {SMALL} --precision int8 --calibration {tmp_path / 'c.json'} --output"
        f" {tmp_path / 'b'}"
    )
    with pytest.raises(
        AnyFlowError,
        match="--keep-layers is 30; allowed are 0 to 29, since 30 layers can be quantized",
    ):
        run_export(f"{words} --keep-layers 30")
    write_calibration(tmp_path / "c.json", calibration.model_copy(update={"weights": "0" * 64}))
    with pytest.raises(AnyFlowError, match="is of the weights 000000000000…"):
        run_export(f"{words} --keep-layers 2")


def test_layers_are_chosen_with_attention_as_it_will_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fidelity that was measured without FP8 attention is not the bundle's."""
    weights = RandomWeights(WIDE_HEADS, "heads that fit")
    given = {}

    def probe(*arguments: object, **named: object) -> None:
        given["spec"] = arguments[2]
        raise AnyFlowError("far enough")

    monkeypatch.setattr("anyflow_deploy.cli.quantize.make_analyzer", probe)
    for attention in ("fp8", "high"):
        options = parse_options(
            ExportOptions,
            shlex.split(f"--model tiny --precision fp8 --attention {attention} --min-psnr 30dB"),
        )
        with pytest.raises(AnyFlowError, match="far enough"):
            choose_full_precision_layers(
                options, options.spec, weights, made_up(WIDE_HEADS), NullProgress()
            )
        assert given["spec"] == PrecisionSpec("fp8", "fp32", attention)


def test_a_failed_export_keeps_its_own_calibrations_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise AnyFlowError("no room")

    monkeypatch.setattr("anyflow_deploy.export.exporter.export_bundle", full)
    monkeypatch.setattr(
        "anyflow_deploy.cli.quantize._cpu_video_size",
        lambda weights: {"frames": 1, "height": 16, "width": 16},
    )
    with pytest.raises(AnyFlowError, match="no room"):
        run_export(f"--model tiny --random-weights --precision int8 --output {tmp_path / 'b'}")
    assert [path.name for path in tmp_path.iterdir()] == [".b-calibration.json.rollouts"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--precision int8 --calibration none.json",
            r"none\.json does not exist\. Make one: anyflow-calibrate",
        ),
        (
            "--precision int8 --calibration c.json",
            "of another architecture than the weights: .* against",
        ),
        (
            "--precision fp8 --attention fp8 --attention-op attention",
            "rounds between its two products, where the operator Attention has no room",
        ),
        ("--precision int8 --attention fp8", "attention is fp8 at precision int8"),
        ("--precision int8 --output taken", "taken exists"),
        (
            "--precision int8 --calibration c.json --keep-layers 2",
            "of another architecture than the weights: .* against",
        ),
        ("--precision int8 --calibration taken", "taken cannot be read: Is a directory"),
    ],
)
def test_refusals_leave_nothing(
    words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_calibration(tmp_path / "c.json", calibration_of(SMALL))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    with pytest.raises(AnyFlowError, match=message):
        run_export(f"--model tiny --random-weights {words}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.json", "taken"]
