"""Check that a refittable plan knows every bias.

TensorRT 11.3 can lose the bias of a Gemm when it builds with REFIT: it computes with zeros, and the
bias is not among the weights that can be refitted. So each bias of the graph is looked up there.
"""

from __future__ import annotations

from onnx import ModelProto

from anyflow_deploy.engines.tensorrt.api import LOGGER, TITLE, trt
from anyflow_deploy.errors import BackendError


def check_biases(engine: trt.ICudaEngine, model: ModelProto, graph: str) -> None:
    """Refuse a refittable engine that has lost a bias.

    Args:
        engine: the opened plan.
        model: the graph it was built from, with or without its weights.
        graph: its name, for the message.

    Raises:
        BackendError: with the names of the biases.
    """
    refittable = set(trt.Refitter(engine, LOGGER).get_all_weights())
    missing = [name for name in bias_names(model) if name not in refittable]
    if missing:
        some = ", ".join(missing[:4]) + (", …" if len(missing) > 4 else "")
        raise BackendError(
            f"{TITLE} has lost {len(missing)} biases of {graph!r} ({some}), a known fault of"
            " --refit in TensorRT 11.3: results would be wrong. Build without --refit, or use"
            " --strip, which does not have the fault."
        )


def bias_names(model: ModelProto) -> list[str]:
    """Return the names of the initializers that a Gemm or Conv adds to its product."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return [
        node.input[2]
        for node in model.graph.node
        if node.op_type in ("Gemm", "Conv") and len(node.input) > 2 and node.input[2] in weights
    ]
