"""The exported graph itself: names, types, operators, shapes; and what ONNX Runtime is given in its
place."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import load_file

from anyflow_deploy import MODELS, Bundle, load_engine, noise
from anyflow_deploy.checkpoints.checkpoint import open_checkpoint
from anyflow_deploy.checkpoints.random_weights import RandomWeights
from anyflow_deploy.engines.metrics import difference
from anyflow_deploy.engines.onnxruntime.graph_rewrites import fuse_attention
from anyflow_deploy.export.diffusers_engine import DiffusersEngine
from anyflow_deploy.export.trace import trace_graph
from anyflow_deploy.model.transformer import FlowMapTransformer, constants
from anyflow_deploy.shape_ranges import Range, narrow_ranges, widest_ranges
from tests.conftest import SMALL, Export

TENSORRT_10_3 = """
Add Cast Concat Constant Conv Cos Div Expand Gelu Gemm Identity LayerNormalization MatMul Mul Pow
Reciprocal ReduceMean
Reshape Shape Sigmoid Sin Slice Softmax Split Sqrt Squeeze Sub Transpose Unsqueeze
"""
"""Operators we use that the ONNX parser of TensorRT 10.3 takes in float32 and float16 (from its
operator table)."""


def loaded(bundle: Bundle) -> onnx.ModelProto:
    return onnx.load(str(bundle.path / "transition.onnx"), load_external_data=False)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_opset_20_is_what_tensorrt_10_3_parses(small_bundle: Export, precision: str) -> None:
    model = loaded(small_bundle(precision, 20))
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 20)]
    assert {node.op_type for node in model.graph.node} <= set(TENSORRT_10_3.split())


def test_opset_23_has_the_large_operators(
    small_bundle: Export, small_config: dict[str, int]
) -> None:
    count = Counter(node.op_type for node in loaded(small_bundle("fp32", 23)).graph.node)
    assert count["Attention"] == 2 * small_config["num_layers"]
    assert count["RMSNormalization"] == 4 * small_config["num_layers"]
    assert count["Softmax"] == 0


def test_every_parameter_keeps_its_name_and_is_stored_once(small_bundle: Export) -> None:
    bundle = small_bundle("fp32", 20)
    checkpoint = open_checkpoint(SMALL)
    model = loaded(bundle)
    names = [tensor.name for tensor in model.graph.initializer]
    assert set(names) == set(checkpoint.shapes()) | set(constants(checkpoint.architecture))
    stored = load_file(bundle.path / "weights.safetensors")
    assert set(stored) == set(names) and len(names) == len(set(names))
    for name in checkpoint.shapes():
        np.testing.assert_array_equal(stored[name], checkpoint.read(name).numpy())
    for tensor in model.graph.initializer:
        assert {entry.key: entry.value for entry in tensor.external_data}[
            "location"
        ] == "weights.safetensors"


def test_half_precision_is_the_large_layers_only(small_bundle: Export) -> None:
    kinds = {
        name: array.dtype
        for name, array in load_file(small_bundle("fp16", 20).path / "weights.safetensors").items()
    }
    half = {name for name, kind in kinds.items() if kind == np.float16}
    large = ("attn1.to_", "attn2.to_", "ffn.", "text_embedder.")
    assert half == {name for name in kinds if any(part in name for part in large)}


def test_the_achieved_precision_is_counted_from_the_graph(small_bundle: Export) -> None:
    bundle = small_bundle("fp16", 20)
    stored = load_file(bundle.path / "weights.safetensors").values()
    assert bundle.manifest.achieved.weight_bytes == {
        "F16": sum(a.nbytes for a in stored if a.dtype == np.float16),
        "F32": sum(a.nbytes for a in stored if a.dtype == np.float32),
    }


def test_modulation_is_never_expanded_to_tokens(small_bundle: Export) -> None:
    nodes = loaded(small_bundle("fp32", 20)).graph.node
    assert not [
        n.name for n in nodes if n.op_type in {"Expand", "Tile"} and n.name.startswith("blocks")
    ]


def test_the_graph_says_nothing_about_the_machine_it_was_made_on(small_bundle: Export) -> None:
    data = (small_bundle("fp32", 20).path / "transition.onnx").read_bytes()
    assert (
        b"site-packages" not in data
        and b".py" not in data
        and b"/root" not in data
        and b"/home" not in data
    )


def test_nodes_are_named_after_their_modules(small_bundle: Export) -> None:
    names = [node.name for node in loaded(small_bundle("fp32", 20)).graph.node]
    assert "blocks.0.attn1.to_q/Gemm" in names and len(names) == len(set(names))


@pytest.mark.parametrize("opset", [20, 23])
def test_every_attention_is_fused_for_onnx_runtime(
    small_bundle: Export, small_config: dict[str, int], opset: int
) -> None:
    model = loaded(small_bundle("fp32", opset))
    assert (
        fuse_attention(model, small_config["num_attention_heads"]) == 2 * small_config["num_layers"]
    )
    assert not [n for n in model.graph.node if n.op_type in {"Softmax", "Attention"}]


@pytest.mark.parametrize(
    ("batch", "frames", "height", "width", "text"),
    [(1, 1, 2, 2, 1), (1, 5, 4, 16, 3), (3, 2, 6, 2, 12), (2, 1, 20, 8, 2)],
)
@pytest.mark.parametrize("opset", [20, 23])
def test_every_axis_is_dynamic(
    small_bundle: Export, opset: int, batch: int, frames: int, height: int, width: int, text: int
) -> None:
    bundle = small_bundle("fp32", opset)
    a = bundle.manifest.architecture
    latents = noise((batch, frames, a.in_channels, height, width), 3)
    words = noise((batch, text, a.text_dim), 4)
    velocities = []
    for engine in (load_engine(bundle), DiffusersEngine(open_checkpoint(SMALL))):
        with engine.start(latents, words) as run:
            velocities.append(run.velocity(800, 300))
    assert difference(*velocities).relative_l2 < 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {"deltatime_type": "t-r"},
        {"cross_attn_norm": False},
        {"gate_value": 0.6},
        {"patch_size": (1, 4, 4)},
    ],
)
def test_variants_of_the_architecture_agree_with_diffusers(changes: dict[str, object]) -> None:
    architecture = dataclasses.replace(MODELS["tiny"].architecture, num_layers=1, **changes)
    weights = RandomWeights(architecture, "variant")
    module = FlowMapTransformer(architecture)
    module.load_state_dict({name: weights.read(name) for name in weights.shapes()})
    for name, value in constants(architecture).items():
        module.get_buffer(name).copy_(value)
    latents = noise((1, 2, 16, 8, 8), 0)
    text = noise((1, 3, architecture.text_dim), 1)
    with torch.no_grad():
        times = torch.full((1, 2), 900.0), torch.full((1, 2), 250.0)
        _, ours = module(torch.from_numpy(latents), *times, torch.from_numpy(text))
    with DiffusersEngine(weights).start(latents, text) as run:
        assert difference(ours.numpy(), run.velocity(900, 250)).relative_l2 < 1e-5


def test_tracing_needs_no_memory_for_weights() -> None:
    """The 14B model's shape, two layers of it: 2.6 GB of parameters that are never allocated."""
    architecture = dataclasses.replace(MODELS["14b"].architecture, num_layers=2)
    ranges = narrow_ranges(widest_ranges(architecture), {"batch": Range(1, 1)})
    traced = trace_graph("transition", architecture, ranges, "fp16")
    assert sum(np.prod(p.shape) for p in traced.parameters.values()) > 8e8
    assert set(traced.symbols.values()) == {"frames", "rows", "columns", "text"}
