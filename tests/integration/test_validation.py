"""Validation finds what is wrong and passes what is right; a damaged engine must fail."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from anyflow_deploy import AnyFlowError, Bundle, load_engine, noise
from anyflow_deploy.bundle.atomic_io import file_sha256
from anyflow_deploy.checkpoints.safetensors_stream import read_header
from anyflow_deploy.cli.validate import ValidateOptions, validate
from anyflow_deploy.engines import validation
from anyflow_deploy.engines.metrics import difference
from anyflow_deploy.engines.validation_report import plot_validation
from tests.conftest import SMALL, Export


def damaged(bundle: Bundle, folder: Path, name: str, factor: float) -> Path:
    """A copy of a bundle in which one weight was scaled and the manifest signed anew: only numbers
    can tell."""
    shutil.copytree(bundle.path, folder)
    weights = folder / "weights.safetensors"
    entry = read_header(weights)[name]
    with weights.open("r+b") as file:
        file.seek(entry.offset)
        values = np.frombuffer(file.read(entry.bytes), np.float32) * np.float32(factor)
        file.seek(entry.offset)
        file.write(values.tobytes())
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["weights.safetensors"]["sha256"] = file_sha256(weights)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_right_engine_is_valid(
    small_bundle: object, precision: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = small_bundle(precision)  # type: ignore[operator]
    assert validate(ValidateOptions(bundle=bundle.path, output=tmp_path, json=True)) == 0
    report = json.loads((tmp_path / "validation.json").read_text())
    document = json.loads(capsys.readouterr().out)
    assert document == {"report": str(tmp_path / "validation.json"), **report}
    assert (
        report["passed"] and report["failures"] == [] and report["bundle_sha256"] == bundle.digest
    )
    assert {item["kind"] for item in report["transitions"]} == {
        "next",
        "half",
        "clean",
        "same",
        "mixed",
    }
    assert [item["steps"] for item in report["rollouts"]] == [1, 2, 4, 8]
    assert all(math.isfinite(item["difference"]["psnr_db"]) for item in report["transitions"])
    assert (tmp_path / "validation.png").read_bytes().startswith(b"\x89PNG")


def test_a_right_causal_engine_is_valid_and_a_damaged_cache_is_not(
    export_once: Export, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = export_once(SMALL.parent / "causal")
    assert (
        validate(
            ValidateOptions(bundle=bundle.path, output=tmp_path, steps=(1, 2), height=64, width=64)
        )
        == 0
    )
    report = json.loads((tmp_path / "validation.json").read_text())
    assert report["chunks"] == [1, 3, 3, 3, 2] and {
        item["chunk"] for item in report["transitions"]
    } == {0, 4}
    assert (tmp_path / "validation.png").read_bytes().startswith(b"\x89PNG")
    folder = damaged(bundle, tmp_path / "damaged", "far_patch_embedding.weight", 1.05)
    assert validate(ValidateOptions(bundle=folder, steps=(1, 2), height=64, width=64)) == 1
    failures = json.loads((folder / "validation.json").read_text())["failures"]
    assert failures and all("of chunk 4" in text or "rollout" in text for text in failures)
    with pytest.raises(AnyFlowError, match="Leave --frames out"):
        validate(ValidateOptions(bundle=bundle.path, frames=9))


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("blocks.1.attn1.to_v.weight", 1.01),
        ("condition_embedder.delta_embedder.linear_2.weight", 0.99),
        ("proj_out.bias", 1.5),
    ],
)
def test_a_damaged_engine_is_not(
    tiny_bundle: Bundle,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    factor: float,
) -> None:
    folder = damaged(tiny_bundle, tmp_path / "damaged", name, factor)
    assert validate(ValidateOptions(bundle=folder, steps=(1, 2))) == 1
    assert "NOT VALID" in capsys.readouterr().err
    report = json.loads((folder / "validation.json").read_text())
    assert not report["passed"] and "relative L2" in report["failures"][0]


def test_weights_that_are_not_finite_fail(tiny_bundle: Bundle, tmp_path: Path) -> None:
    folder = damaged(tiny_bundle, tmp_path / "damaged", "blocks.0.ffn.net.2.weight", math.nan)
    assert validate(ValidateOptions(bundle=folder, steps=(1,))) == 1
    report = json.loads((folder / "validation.json").read_text())
    assert (
        "NaN" in report["failures"][0]
        and report["rollouts"][0]["difference"]["relative_l2"] is None
    )


def test_the_report_stays_where_it_can_be_written(tiny_bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(AnyFlowError, match="is not a folder"):
        validate(ValidateOptions(bundle=tiny_bundle.path, output=tmp_path / "missing"))


def test_validating_does_not_change_the_bundle(tiny_bundle: Bundle) -> None:
    before = tiny_bundle.digest
    assert validate(ValidateOptions(bundle=tiny_bundle.path, steps=(1,))) == 0
    assert load_engine(tiny_bundle.path).bundle.digest == before


def test_another_models_checkpoint_is_refused(tiny_bundle: Bundle) -> None:
    from tests.conftest import SMALL

    with pytest.raises(AnyFlowError, match="another model"):
        validate(ValidateOptions(bundle=tiny_bundle.path, checkpoint=str(SMALL)))


def test_a_precision_without_thresholds_is_refused(tiny_bundle: Bundle) -> None:
    engine = load_engine(tiny_bundle)
    with pytest.raises(AnyFlowError, match="no thresholds for precision 'fp4'"):
        validation.validate(engine, engine, "fp4", (1, 1, 16, 4, 4), (1, 2, 64))


def test_an_engine_agrees_with_itself_exactly_and_is_drawn(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    engine = load_engine(tiny_bundle)
    result = validation.validate(engine, engine, "fp32", (1, 2, 16, 4, 4), (1, 2, 64), steps=(1,))
    assert {item.difference.relative_l2 for item in result.transitions} == {
        0.0
    } and not result.failures
    plot_validation(result, tmp_path / "zero.png")
    assert (tmp_path / "zero.png").stat().st_size > 1000


def test_every_threshold_has_a_reason() -> None:
    for threshold in validation.THRESHOLDS.values():
        assert 0 < threshold.transition < 0.1 and len(threshold.reason) > 40


def test_metrics_of_known_arrays() -> None:
    reference = np.array([3.0, 4.0], np.float32)
    d = difference(reference * np.float32(1.1), reference)
    assert d.relative_l2 == pytest.approx(0.1, rel=1e-5) and d.cosine == pytest.approx(1)
    assert d.max_abs == pytest.approx(0.4, rel=1e-5)
    assert d.psnr_db == pytest.approx(10 * math.log10(1 / 0.125), rel=1e-4)
    opposite = difference(-reference, reference)
    assert opposite.cosine == pytest.approx(-1) and opposite.relative_l2 == pytest.approx(2)
    assert difference(noise((4,), 0), noise((4,), 0)).psnr_db == math.inf
