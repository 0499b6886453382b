"""anyflow-debug names the layer that is wrong, says nothing of those that are right, and builds
what it compares."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from anyflow_deploy import AnyFlowError, Bundle
from anyflow_deploy.cli.debug import DebugOptions, debug
from anyflow_deploy.cli.options import parse_options
from anyflow_deploy.debugging import polygraphy_setup
from tests.conftest import CAUSAL, SMALL, Export
from tests.integration.test_validation import damaged

SMALL_VIDEO = {"frames": 5, "height": 32, "width": 48}


def run(bundle: Bundle | Path, output: Path, **options: Any) -> tuple[int, dict[str, Any]]:
    """Exit status and report."""
    path = bundle if isinstance(bundle, Path) else bundle.path
    status = debug(DebugOptions(bundle=path, output=output, **options))
    return status, json.loads((output / "debug.json").read_text())


def names(report: dict[str, Any], part: str) -> list[str]:
    return [item["name"] for item in report[part]]


def test_a_right_engine_passes(
    small_bundle: Export, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = small_bundle("fp16")
    status, report = run(bundle, tmp_path, **SMALL_VIDEO, json=True)
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"report": str(tmp_path / "debug.json"), **report}
    assert status == 0 and report["passed"] and report["first_over"] is None
    assert report["bundle_sha256"] == report["reference_sha256"] == bundle.digest
    assert report["threshold"] == 5e-3 and report["layers"] == []
    blocks = [name for name in names(report, "points") if name.startswith("blocks.")]
    assert blocks == ["blocks.0", "blocks.1", "blocks.2"]
    assert names(report, "outputs") == ["velocity", "z_r"]
    errors = [item["difference"]["relative_l2"] for item in report["points"]]
    assert 0 < max(errors) < 1e-3
    assert (tmp_path / "debug.png").read_bytes().startswith(b"\x89PNG")
    assert "nothing is over 0.005" in shown.err


@pytest.mark.parametrize(
    ("weight", "layer"),
    [
        ("blocks.1.attn1.to_v.weight", "blocks.1.attn1.to_v"),
        ("blocks.2.ffn.net.2.bias", "blocks.2.ffn.net.2"),
        ("blocks.0.attn2.norm_k.weight", "blocks.0.attn2.norm_k"),
        ("blocks.1.scale_shift_table", "blocks.1/Add"),
        ("condition_embedder.time_proj.weight", "condition_embedder.time_proj"),
        ("proj_out.bias", "proj_out"),
    ],
)
def test_a_fault_in_one_layer_is_found_by_name(
    small_bundle: Export,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    weight: str,
    layer: str,
) -> None:
    bundle = small_bundle("fp32")
    folder = damaged(bundle, tmp_path / "damaged", weight, 1.05)
    status, report = run(folder, tmp_path, reference=bundle.path, **SMALL_VIDEO)
    assert status == 1 and not report["passed"]
    assert report["first_over"] == layer
    assert f"first over 2e-05: {layer} " in capsys.readouterr().err


@pytest.mark.parametrize("mark", ["layers", "nodes"])
def test_bisection_finds_the_same_layer(small_bundle: Export, tmp_path: Path, mark: str) -> None:
    bundle = small_bundle("fp32")
    weight = "blocks.1.attn2.to_out.0.weight"
    folder = damaged(bundle, tmp_path / "damaged", weight, 1.05)
    options = {"reference": bundle.path, "mark": mark, **SMALL_VIDEO}
    everything = run(folder, tmp_path, **options)[1]
    status, report = run(folder, tmp_path, bisect=True, **options)
    assert status == 1
    assert report["first_over"] == everything["first_over"]
    assert report["first_over"].startswith("blocks.1.attn2.to_out.0")
    assert len(report["points"]) < len(everything["points"]) / 3
    assert report["rounds"] <= 8


def test_a_fault_is_found_through_the_rounding_of_another_precision(
    small_bundle: Export, export_once: Export, tmp_path: Path
) -> None:
    """The damaged weight is in the reference here, which is fp32; opset 23 has other nodes. In the
    block's result the fault is below fp16's threshold."""
    folder = damaged(small_bundle("fp32"), tmp_path / "damaged", "blocks.2.norm2.weight", 1.05)
    fused = export_once(SMALL, "fp16", 23)
    status, report = run(fused, tmp_path, reference=folder, mark="layers", **SMALL_VIDEO)
    assert status == 1 and report["first_over"] == "blocks.2.norm2"


def test_what_is_not_finite_is_named(small_bundle: Export, tmp_path: Path) -> None:
    bundle = small_bundle("fp32")
    folder = damaged(bundle, tmp_path / "damaged", "blocks.0.ffn.net.2.weight", math.nan)
    status, report = run(folder, tmp_path, reference=bundle.path, **SMALL_VIDEO)
    assert status == 1 and report["first_over"] == "blocks.0.ffn.net.2"
    (found,) = [x["difference"] for x in report["layers"] if x["name"] == "blocks.0.ffn.net.2"]
    assert found["relative_l2"] is None and found["not_finite"] > 0


@pytest.mark.parametrize("graph", ["text", "chunk", "compress"])
def test_every_graph_of_a_causal_bundle_is_compared(
    export_once: Export, tmp_path: Path, graph: str
) -> None:
    half, full = export_once(CAUSAL, "fp16"), export_once(CAUSAL)
    options = {"reference": full.path, "graph": graph, "height": 64, "width": 64}
    status, report = run(half, tmp_path, **options)
    assert status == 0 and report["graph"] == graph
    assert {"blocks.0", "blocks.1", "blocks.2"} <= set(names(report, "points"))
    worst = max(item["difference"]["relative_l2"] for item in report["points"])
    assert 1e-5 < worst < 1e-3


@pytest.mark.parametrize(
    ("weight", "graph", "layer"),
    [
        ("far_patch_embedding.weight", "compress", "far_patch_embedding"),
        ("far_patch_embedding.weight", "chunk", None),
        # The last block of this graph gives keys and values, and nothing that holds both
        ("blocks.2.attn1.to_v.bias", "compress", "blocks.2.attn1.to_v"),
        ("blocks.1.attn2.to_k.weight", "text", "blocks.1.attn2.to_k"),
    ],
)
def test_a_fault_of_a_causal_bundle_is_found_in_its_graph(
    export_once: Export, tmp_path: Path, weight: str, graph: str, layer: str | None
) -> None:
    bundle = export_once(CAUSAL)
    folder = damaged(bundle, tmp_path / "damaged", weight, 1.5)
    options = {"reference": bundle.path, "graph": graph, "height": 64, "width": 64}
    status, report = run(folder, tmp_path, **options)
    assert report["first_over"] == layer
    assert status == (0 if layer is None else 1)


def test_int8_is_compared_with_its_own_weights_and_with_float32(
    export_quantized: Export,
    small_bundle: Export,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bundle = export_quantized(SMALL, "int8")
    options: dict[str, Any] = {"mark": "layers", **SMALL_VIDEO}
    status, own = run(bundle, tmp_path, **options)
    assert status == 0 and "blocks.0.attn1.to_v" in names(own, "points")
    assert "SmoothQuant" not in capsys.readouterr().err
    status, other = run(bundle, tmp_path, reference=small_bundle("fp32").path, **options)
    assert status == 0 and "SmoothQuant" in capsys.readouterr().err
    assert not {"blocks.0.attn1.to_v", "blocks.0.norm2"} & set(names(other, "points"))
    assert {"blocks.0.attn1.to_q", "blocks.0.ffn.net.2", "blocks.2"} <= set(names(other, "points"))
    errors = [
        {x["name"]: x["difference"]["relative_l2"] for x in r["points"]} for r in (own, other)
    ]
    assert errors[0]["blocks.2"] < errors[1]["blocks.2"]  # rounded weights come on top
    with pytest.raises(AnyFlowError, match="--mark nodes compares graphs that have the same"):
        run(bundle, tmp_path, reference=small_bundle("fp32").path, mark="nodes")


def test_saved_embeddings_take_the_place_of_random_ones(
    small_bundle: Export, tmp_path: Path
) -> None:
    file = tmp_path / "fox.safetensors"
    save_file({"prompt_embeds": np.ones((2, 7, 32), np.float32)}, file)
    _, report = run(small_bundle("fp16"), tmp_path, prompt_embeds=file, **SMALL_VIDEO)
    assert report["text"] == [1, 7, 32]
    save_file({"prompt_embeds": np.ones((2, 7, 64), np.float32)}, file)
    with pytest.raises(AnyFlowError, match=r"this model takes \(prompts, tokens, 32\)"):
        run(small_bundle("fp16"), tmp_path, prompt_embeds=file)


def test_what_cannot_be_compared_is_refused_before_work(
    small_bundle: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, export_once: Export
) -> None:
    bundle = small_bundle("fp32")
    with pytest.raises(AnyFlowError, match="would be compared with itself"):
        run(bundle, tmp_path)
    with pytest.raises(AnyFlowError, match="is another model"):
        run(bundle, tmp_path, reference=export_once(CAUSAL).path)
    with pytest.raises(AnyFlowError, match="--graph is 'chunks'; .* has text, chunk, compress"):
        run(export_once(CAUSAL), tmp_path, graph="chunks")
    with pytest.raises(AnyFlowError, match="Leave --frames out"):
        run(export_once(CAUSAL), tmp_path, reference=export_once(CAUSAL).path, frames=9)
    with pytest.raises(AnyFlowError, match="is not a folder"):
        run(bundle, tmp_path / "missing", reference=bundle.path)
    monkeypatch.setattr(polygraphy_setup, "has_gpu", lambda: False)
    with pytest.raises(AnyFlowError, match="needs|runs its layers on a GPU"):
        run(bundle, tmp_path, backend="tensorrt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--mark", "layer"), r"--mark is 'layer'; allowed are .*Did you mean 'layers'"),
        (("--t", "250", "--r", "500"), "a step leads down"),
        (("--threshold", "0"), "--threshold is '0'"),
    ],
)
def test_wrong_options_are_named(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(AnyFlowError, match=message):
        parse_options(DebugOptions, ["bundle", *words])


BUILD = """
import json, sys
from pathlib import Path
from anyflow_deploy import load_bundle, noise
from anyflow_deploy.debugging.backends import ReferenceSide, TensorRTSide
from anyflow_deploy.debugging.inputs import DebugState, make_feed
from anyflow_deploy.debugging.points import find_points, mark_outputs
from anyflow_deploy.debugging.polygraphy_setup import use_polygraphy
use_polygraphy("tensorrt-rtx")
folder, graph = sys.argv[1:]
bundle = load_bundle(folder)
reference = ReferenceSide(bundle, graph)
state = DebugState((1, 2, 4, 8, 8), noise((1, 8, 32), 1), 1000.0, 0.0)
feed = make_feed(bundle.manifest, graph, state, reference.run)
side = TensorRTSide(bundle, graph, "tensorrt-rtx", [(8, 9)])
points = find_points(side.model, reference.model, "layers")
marked = mark_outputs(side.model, {point.name: point.candidate for point in points})
plan = side.build(marked, feed)
try:
    side.runner(marked, feed).activate()
    error = ""
except Exception as refusal:
    error = str(refusal)
print(json.dumps([side.description, len(points), len(memoryview(plan)), error]))
"""


@pytest.mark.parametrize(
    ("model", "graph", "least"), [(CAUSAL, "text", 10), (SMALL, "transition", 90)]
)
def test_nvidias_builder_takes_a_graph_with_marked_outputs(
    export_once: Export, model: Path, graph: str, least: int
) -> None:
    """Through Polygraphy's loaders, for a GPU that is not here; in a process of its own, since
    Polygraphy chooses its library when it is imported."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    bundle = export_once(model, "fp16")
    before = {path: path.stat().st_mtime_ns for path in bundle.path.iterdir()}
    command = [sys.executable, "-c", BUILD, str(bundle.path), graph]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    description, points, size, error = json.loads(done.stdout)
    assert description.startswith("TensorRT for RTX 1.") and description.endswith("fp16")
    assert points >= least and size > 100_000
    if not polygraphy_setup.has_gpu():
        assert "Could not deserialize engine" in error
    assert before == {path: path.stat().st_mtime_ns for path in bundle.path.iterdir()}


@pytest.mark.tensorrt
@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_a_right_engine_passes_on_a_gpu(small_bundle: Export, tmp_path: Path, backend: str) -> None:
    pytest.importorskip(backend.replace("-", "_"), reason=f"{backend} is not installed")
    if not polygraphy_setup.has_gpu():
        pytest.skip("there is no GPU")
    command = [str(Path(sys.executable).with_name("anyflow-debug")), str(small_bundle("fp16").path)]
    words = ["--backend", backend, "--output", str(tmp_path)]
    done = subprocess.run([*command, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
