"""Q/DQ in the exported graphs: form, numbers, SmoothQuant's exactness, what is refused, what was achieved."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file

from anyflow_deploy import MODELS, AnyFlowError, Bundle, load_bundle, load_engine, noise
from anyflow_deploy.calibration import Calibration, TensorRange
from anyflow_deploy.engines.metrics import difference
from anyflow_deploy.engines.onnxruntime_quantized import breaks_fp8, use_integer_products
from anyflow_deploy.engines.sampler import stream
from anyflow_deploy.export import quantization_plan
from anyflow_deploy.export.checkpoint import open_checkpoint
from anyflow_deploy.export.exporter import ExportSettings, export_bundle
from anyflow_deploy.export.network_engine import NetworkEngine
from anyflow_deploy.export.quantization_plan import Plan, planned, stored_scale
from anyflow_deploy.export.random_weights import RandomWeights
from anyflow_deploy.export.transformer import FlowMapTransformer, Linear, constants
from anyflow_deploy.export.weights import Weights, fingerprint
from anyflow_deploy.progress import Silent
from anyflow_deploy.quantized_layers import OPERANDS, candidates
from anyflow_deploy.schedule import Schedule
from tests.conftest import SMALL

CAUSAL = SMALL.parent / "causal"
GRAPHS = {"bidirectional": ("transition",), "causal": ("chunk", "compress", "text")}
Quantized = Callable[..., Bundle]


def hand_made(weights: Weights, text_tokens: int = 12) -> Calibration:
    """Ranges of a few transitions, seen by hooks on our own module (a causal model's blocks are the same)."""
    a = weights.architecture
    module = FlowMapTransformer(a, fused=False)
    module.load_state_dict({name: weights.read(name).float() for name in weights.shapes() if not name.startswith("far_")})
    for name, value in constants(a).items():
        module.get_buffer(name).copy_(value)
    seen: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Callable[[Any, Any], None]:
        def hook(layer: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            largest = inputs[0].abs().flatten(0, -2).amax(0)
            seen[name] = largest.maximum(seen.get(name, largest))

        return hook

    for name, layer in module.named_modules():
        if isinstance(layer, Linear) and name in candidates(a):
            layer.register_forward_pre_hook(watch(f"{name}.input"))
    with torch.no_grad():
        for seed, (t, r) in enumerate(((1000.0, 900.0), (800.0, 300.0), (400.0, 0.0), (0.0, 0.0))):
            latents, text = noise((1, 2, a.in_channels, 8, 8), seed), noise((1, text_tokens, a.text_dim), seed + 9)
            module(torch.from_numpy(latents), torch.full((1, 2), t), torch.full((1, 2), r), torch.from_numpy(text))
    tensors = {name: TensorRange(amax=float(v.max()) * 1.2, channels=(v * 1.2).tolist()) for name, v in seen.items()}
    for n in range(a.num_layers):
        for operand in OPERANDS:
            for kind in ("attn1", "attn2"):
                tensors[f"blocks.{n}.{kind}.{operand}"] = TensorRange(amax=1.0 if operand == "probabilities" else 8.0)
    return Calibration(
        config=a.as_config(), weights=fingerprint(weights), prompts=[], steps=[], seeds=[], shift=5.0, shapes=[], tools={},
        tensors=tensors,
    )  # fmt: skip


@pytest.fixture(scope="module")
def calibrations() -> dict[Path, Calibration]:
    return {folder: hand_made(open_checkpoint(folder)) for folder in (SMALL, CAUSAL)}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory, calibrations: dict[Path, Calibration]) -> Quantized:
    """Exports a golden model, once for each setting."""
    made: dict[tuple[object, ...], Bundle] = {}

    def bundle(folder: Path = SMALL, precision: str = "int8", **others: Any) -> Bundle:
        key = (folder, precision, *sorted(others.items()))
        if key not in made:
            settings = ExportSettings(precision, calibration=calibrations[folder], **others)
            made[key] = export_bundle(open_checkpoint(folder), tmp_path_factory.mktemp("quantized") / "bundle", settings)
        return made[key]

    return bundle


def loaded(bundle: Bundle, graph: str = "transition") -> onnx.ModelProto:
    return onnx.load(str(bundle.path / f"{graph}.onnx"), load_external_data=False)


def velocity(engine: Any, a: Any, seed: int = 3) -> np.ndarray[Any, Any]:
    latents, text = noise((1, 2, a.in_channels, 8, 8), seed), noise((1, 12, a.text_dim), seed + 1)
    with engine.start(latents, text) as run:
        return np.concatenate([run.velocity(t, r) for t, r in ((1000, 900), (700, 300), (300, 0))])


@pytest.mark.parametrize("folder", [SMALL, CAUSAL])
@pytest.mark.parametrize(("precision", "kind"), [("int8", TensorProto.INT8), ("fp8", TensorProto.FLOAT8E4M3FN)])
def test_every_gemm_of_the_blocks_is_quantized_in_every_graph(
    quantized: Quantized, folder: Path, precision: str, kind: int
) -> None:
    bundle = quantized(folder, precision)
    layers = set(candidates(bundle.manifest.architecture))
    found = set()
    for name in GRAPHS[bundle.manifest.kind]:
        model = loaded(bundle, name)
        stored = {t.name: t.data_type for t in model.graph.initializer}
        maker = {o: n for n in model.graph.node for o in n.output}
        for node in model.graph.node:
            layer = node.name.removesuffix("/Gemm")
            if node.op_type == "Gemm" and layer in layers:
                x, weight = (maker[i] for i in node.input)
                assert x.op_type == weight.op_type == "DequantizeLinear" and maker[x.input[0]].op_type == "QuantizeLinear"
                assert weight.input[0] == f"{layer}.weight" and stored[weight.input[0]] == kind
                found.add(layer)
    assert found == layers


@pytest.mark.parametrize("opset", [20, 23])
@pytest.mark.parametrize("base", ["fp32", "fp16"])
@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_it_runs_and_is_close(quantized: Quantized, precision: str, base: str, opset: int) -> None:
    bundle = quantized(SMALL, precision, base=base, opset=opset)
    assert bundle.manifest.base == base and not bundle.manifest.achieved.kept_high
    model = loaded(bundle)
    assert {o.version for o in model.opset_import if not o.domain} == {opset}
    reference = velocity(NetworkEngine(open_checkpoint(SMALL)), bundle.manifest.architecture)
    apart = difference(velocity(load_engine(bundle), bundle.manifest.architecture), reference).relative_l2
    assert 1e-4 < apart < 0.02  # rounded, and no more than that


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_layers_with_one_input_share_its_quantize_linear(quantized: Quantized, precision: str) -> None:
    bundle = quantized(SMALL, precision)
    count = Counter(node.op_type for node in loaded(bundle).graph.node)
    layers = bundle.manifest.architecture.num_layers
    assert count["QuantizeLinear"] == 6 * layers + 1  # q k v together, two outputs, query, two of the ffn; the text once
    assert len({node.name for node in loaded(bundle).graph.node}) == len(loaded(bundle).graph.node)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_causal_streams_run_on_every_graph(quantized: Quantized, precision: str) -> None:
    bundle = quantized(CAUSAL, precision)
    a, chunks = bundle.manifest.architecture, (1, 3, 3, 3, 2)
    latents, text = noise((1, sum(chunks), a.in_channels, 8, 8), 1), noise((1, 12, a.text_dim), 2)
    videos = []
    for engine in (load_engine(bundle), NetworkEngine(open_checkpoint(CAUSAL))):
        videos.append(np.concatenate([c.latents for c in stream(engine, latents, text, Schedule.uniform(2), chunks)], axis=1))
    assert 1e-4 < difference(*videos).relative_l2 < 0.03


def test_stored_weights_are_the_rounded_ones(quantized: Quantized) -> None:
    stored = load_file(quantized(SMALL, "int8", smooth=False).path / "weights.safetensors")
    name = "blocks.1.ffn.net.2.weight"
    weight, scale = open_checkpoint(SMALL).read(name), stored[f"{name}_scale"]
    assert stored[name].dtype == torch.int8 and scale.shape == weight.shape[:1]
    expected = (weight / scale[:, None]).round()
    assert torch.equal(stored[name].float(), expected) and expected.abs().max() == 127
    small = load_file(quantized(SMALL, "fp8").path / "weights.safetensors")
    scale = small[f"{name}_scale"]
    assert scale.shape == () and torch.equal(small[name].float(), (weight / scale).to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["I8", "F8_E4M3"])
def test_scales_are_rounded_up_and_never_zero(kind: str, dtype: torch.dtype) -> None:
    amax = torch.cat((torch.rand(2000) * 100, torch.zeros(1), torch.rand(50) * 1e-6))
    scale = stored_scale(amax, kind, dtype)
    largest = quantization_plan.LARGEST[kind]
    assert scale.dtype == dtype and bool((scale.float() * largest >= amax).all())
    assert bool((scale.float() * largest <= (amax * 1.02).clamp_min(float(torch.finfo(dtype).tiny) * largest * 1.01)).all())


def test_a_layer_computes_what_the_integers_say(quantized: Quantized) -> None:
    """Against Q/DQ in numpy: one layer, cut out of the bundle's graph, through the rewritten form and as it stands."""
    bundle = quantized(SMALL, "int8")
    stored = load_file(bundle.path / "weights.safetensors")
    layer, x = "blocks.0.ffn.net.0.proj", noise((40, 96), 5) * 3
    scale = stored["blocks.0.ffn.net.0.proj.input_scale"].numpy()
    weight, weight_scale = (stored[f"{layer}.{part}"].numpy() for part in ("weight", "weight_scale"))
    inputs = np.clip(np.rint(x / scale), -128, 127) * scale
    expected = inputs @ (weight * weight_scale[:, None]).T + stored[f"{layer}.bias"].numpy()
    for unsigned in (None, False, True):
        model = _one_layer(stored, layer, f"{layer}.input_scale")
        if unsigned is not None:
            assert use_integer_products(model, unsigned) == 1
            assert [n.op_type for n in model.graph.node][-1] == "MatMulIntegerToFloat"
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        np.testing.assert_allclose(session.run(None, {"x": x})[0], expected, rtol=1e-4, atol=1e-4)


def _one_layer(stored: dict[str, torch.Tensor], layer: str, scale: str) -> onnx.ModelProto:
    names = [scale, "zero_point", f"{layer}.weight", f"{layer}.weight_scale", f"{layer}.bias"]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", scale, "zero_point"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", scale, "zero_point"], ["d"]),
        helper.make_node("DequantizeLinear", [f"{layer}.weight", f"{layer}.weight_scale"], ["w"], axis=0),
        helper.make_node("Gemm", ["d", "w"], ["p"], name=f"{layer}/Gemm", transB=1),
        helper.make_node("Add", ["p", f"{layer}.bias"], ["y"]),
    ]
    border = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["m", None]) for name in ("x", "y")]
    initializers = [numpy_helper.from_array(stored[name].numpy(), name) for name in names]
    graph = helper.make_graph(nodes, "layer", border[:1], border[1:], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


@pytest.mark.parametrize("folder", [SMALL, CAUSAL])
def test_smoothing_alone_changes_nothing(
    folder: Path, calibrations: dict[Path, Calibration], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the rounding taken out, the smoothed graphs compute what the plain ones do."""

    def unquantized(*arguments: Any) -> Plan:
        plan = planned(*arguments)
        assert len(plan.smoothed) == 4 * len({n.split(".")[1] for n in plan.smoothed}) and plan.factors
        plan.inputs.clear()
        return plan

    monkeypatch.setattr("anyflow_deploy.export.exporter.planned", unquantized)
    weights = open_checkpoint(folder)
    bundle = export_bundle(weights, tmp_path / "smooth", ExportSettings("int8", calibration=calibrations[folder]))
    a = weights.architecture
    if not a.causal:
        assert difference(velocity(load_engine(bundle), a), velocity(NetworkEngine(weights), a)).relative_l2 < 1e-5
        return
    latents, text = noise((1, 12, a.in_channels, 8, 8), 1), noise((1, 12, a.text_dim), 2)
    engines = (load_engine(bundle), NetworkEngine(weights))
    videos = [
        np.concatenate([c.latents for c in stream(e, latents, text, Schedule.uniform(1), (1, 3, 3, 3, 2))], axis=1)
        for e in engines
    ]
    assert difference(*videos).relative_l2 < 1e-5


def test_kept_layers_stay_high_and_are_reported(quantized: Quantized) -> None:
    kept = ("blocks.0.attn1.to_q", "blocks.2.ffn.net.2")
    bundle = quantized(SMALL, "int8", kept=kept)
    assert bundle.manifest.achieved.kept_high == dict.fromkeys(kept, "asked for")
    stored = load_file(bundle.path / "weights.safetensors")
    assert stored["blocks.0.attn1.to_q.weight"].dtype == torch.float32
    reference = velocity(NetworkEngine(open_checkpoint(SMALL)), bundle.manifest.architecture)
    assert difference(velocity(load_engine(bundle), bundle.manifest.architecture), reference).relative_l2 < 0.02


def test_what_cannot_be_quantized_is_reported(calibrations: dict[Path, Calibration]) -> None:
    weights, calibration = open_checkpoint(SMALL), calibrations[SMALL]
    dead = {name: TensorRange(amax=0.0, channels=[0.0] * 96) for name in calibration.tensors if ".0.attn1.to_out" in name}
    silent = calibration.model_copy(update={"tensors": {**calibration.tensors, **dead}})
    plan = planned(weights, silent, "int8", "fp32", True, "high", (), Silent())
    assert "zero throughout" in plan.kept["blocks.0.attn1.to_out.0"]
    odd = RandomWeights(dataclasses.replace(MODELS["tiny"].architecture, ffn_dim=200, num_layers=1), "odd")
    plan = planned(odd, hand_made(odd), "fp8", "fp32", True, "high", (), Silent())
    assert set(plan.kept) == {"blocks.0.ffn.net.0.proj", "blocks.0.ffn.net.2"} and "multiple" in plan.kept["blocks.0.ffn.net.2"]
    with pytest.raises(AnyFlowError, match="quantize nothing"):
        planned(weights, calibration, "int8", "fp32", True, "high", tuple(candidates(weights.architecture)), Silent())


def test_fp8_attention(tmp_path: Path) -> None:
    architecture = dataclasses.replace(MODELS["tiny"].architecture, num_layers=1, num_attention_heads=3, attention_head_dim=32)
    weights = RandomWeights(architecture, "wide heads")
    settings = ExportSettings("fp8", calibration=hand_made(weights), attention="fp8")
    bundle = export_bundle(weights, tmp_path / "attention", settings)
    model = loaded(bundle)
    maker = {o: n for n in model.graph.node for o in n.output}
    products = [node for node in model.graph.node if node.op_type == "MatMul" and "attn" in node.name]
    assert len(products) == 4 and all(maker[i].op_type == "DequantizeLinear" for node in products for i in node.input)
    assert bundle.manifest.achieved.quantized_flops > 0.95
    apart = difference(velocity(load_engine(bundle), architecture), velocity(NetworkEngine(weights), architecture))
    assert 1e-3 < apart.relative_l2 < 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"calibration": None}, "needs a calibration.*anyflow-calibrate"),
        ({"base": "fp8"}, "base is 'fp8'; allowed are fp32, fp16, bf16"),
        ({"base": "bf16"}, "bf16 does not run on target 'cpu'"),
        ({"attention": "fp8"}, "attention is fp8 at precision int8 and opset 20"),
        ({"precision": "fp8", "attention": "fp8", "opset": 23}, "precision fp8 and opset 23"),
        ({"precision": "fp16"}, "quantizes nothing, so calibration would have no effect"),
        ({"target": "orin", "precision": "fp8"}, "fp8 does not run on target 'orin'"),
        ({"kept": ("blocks.0.attn1.to_x",)}, "blocks.0.attn1.to_x"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str, calibrations: dict[Path, Calibration], tmp_path: Path) -> None:
    settings = dataclasses.replace(ExportSettings("int8", calibration=calibrations[SMALL]), **changes)
    with pytest.raises(AnyFlowError, match=message):
        export_bundle(open_checkpoint(SMALL), tmp_path / "refused", settings)
    assert not list(tmp_path.iterdir())


def test_a_calibration_of_other_weights_is_refused(calibrations: dict[Path, Calibration], tmp_path: Path) -> None:
    other = calibrations[SMALL].model_copy(update={"weights": "0" * 64})
    with pytest.raises(AnyFlowError, match="000000.*holds"):
        export_bundle(open_checkpoint(SMALL), tmp_path / "refused", ExportSettings("int8", calibration=other))
    with pytest.raises(AnyFlowError, match="another architecture.*_class_name"):
        export_bundle(open_checkpoint(SMALL), tmp_path / "refused", ExportSettings("int8", calibration=calibrations[CAUSAL]))


def test_achieved_is_counted_from_the_finished_graph(quantized: Quantized) -> None:
    bundle = load_bundle(quantized(SMALL, "int8").path)
    achieved = bundle.manifest.achieved
    stored = load_file(bundle.path / "weights.safetensors").values()
    small = sum(tensor.nbytes for tensor in stored if tensor.dtype == torch.int8)
    assert achieved.weight_bytes["I8"] == small
    assert achieved.quantized_weights == round(small / sum(tensor.nbytes for tensor in stored), 4)
    assert 0 < achieved.quantized_flops < 0.1  # 96 channels at 32,760 tokens: attention is nearly everything


def test_the_fp8_fault_of_onnx_runtime_is_where_we_think_it_is() -> None:
    """Fails on the day an older line is mended or a newer one breaks: then `FP8_CURED` has to follow."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["v"]),
        helper.make_node("Gemm", ["d", "v"], ["y"], transB=1),
    ]
    fp8 = TensorProto.FLOAT8E4M3FN
    constants = [("s", TensorProto.FLOAT, [], [0.5]), ("z", fp8, [], [0.0]), ("w", fp8, [16, 16], [1.0] * 256)]
    border = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["m", 16]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "fault", border[:1], border[1:], [helper.make_tensor(*c) for c in constants])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"], enable_fallback=0)
        fails = False
    except Exception as error:  # noqa: BLE001 - ONNX Runtime's exceptions have no common base
        fails = "float8" in str(error)
    assert fails == breaks_fp8(onnxruntime.__version__)
