"""Rebuilds the program of a bundle, which AOTInductor and torch-tensorrt compile.

ONNX is one translation of the network, compiled engines of torch are another, and both start from
the same module: it is built without weights, takes those of the bundle (types, scales and constants
as they are stored) and is recorded by `torch.export`. The weights are shared, not copied.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.export import ExportedProgram

from anyflow_deploy.bundle.bundle import Bundle
from anyflow_deploy.checkpoints.dtypes import CHECKPOINT_DTYPES
from anyflow_deploy.export.quantization.quantized_linear import quantize_linear_layers
from anyflow_deploy.export.trace import MODULES, record_network
from anyflow_deploy.model.transformer import FlowMapTransformer
from anyflow_deploy.precision import get_precision
from anyflow_deploy.shape_ranges import ShapeRanges


def network_from_bundle(
    bundle: Bundle, graph: str, weights: Mapping[str, Tensor]
) -> FlowMapTransformer:
    """Build the torch module of one of a bundle's graphs.

    Attention and norms are single operators.

    Args:
        bundle: an opened bundle.
        graph: a name in `MODULES`.
        weights: all of its weights, on the device that it will run on.
    """
    compute_type = CHECKPOINT_DTYPES[get_precision(bundle.manifest.base).tensor_type]
    with torch.device("meta"):
        network = MODULES[graph](bundle.manifest.architecture, compute_type, True)
    network.requires_grad_(False)
    quantize_linear_layers(network, bundle.manifest.architecture, weights)
    network.load_state_dict(
        {name: weights[name] for name, _ in network.named_parameters()}, strict=False, assign=True
    )
    for name, _ in list(network.named_buffers()):
        module, _, buffer = name.rpartition(".")
        setattr(network.get_submodule(module), buffer, weights[name])
    return network.eval()


def program_from_bundle(
    bundle: Bundle,
    graph: str,
    weights: Mapping[str, Tensor],
    device: str,
    ranges: ShapeRanges | None = None,
) -> ExportedProgram:
    """Build the torch module of one of a bundle's graphs, and record it.

    Args:
        bundle, graph, weights: see `network_from_bundle`.
        device: torch device of the weights.
        ranges: narrower than the bundle's; None for those.
    """
    network = network_from_bundle(bundle, graph, weights)
    manifest = bundle.manifest
    return record_network(
        network,
        graph,
        manifest.architecture,
        ranges or manifest.shape_ranges,
        manifest.base,
        device,
    )
