"""torch-tensorrt's compiler on a bundle's program. **Not run yet**: there was no GPU; see
`engines/torch_tensorrt/engine.py`.

A package in AOTInductor's format is what its documentation recommends for deployment, and the only
one of its formats that holds no pickle of Python's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from anyflow_deploy.bundle.bundle import Bundle
from anyflow_deploy.engines.aotinductor.compiler import prefer_fused_attention
from anyflow_deploy.engines.engine_folder import EngineWriter
from anyflow_deploy.engines.torch_common.weights import TorchWeights
from anyflow_deploy.errors import BackendError
from anyflow_deploy.export.program import program_from_bundle
from anyflow_deploy.export.trace import example_arguments
from anyflow_deploy.progress import Progress
from anyflow_deploy.shape_ranges import Range, ShapeRanges

Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def build_package(
    trt: Any,
    bundle: Bundle,
    device: str,
    axis_ranges: Mapping[str, Range],
    shapes: Mapping[str, Shapes],
    writer: EngineWriter,
    progress: Progress,
) -> dict[str, str]:
    """Build the package into the engine's folder, and return what it consists of.

    Args:
        trt: the torch_tensorrt module.
        bundle: an opened bundle, bidirectional and not quantized.
        device: torch device.
        axis_ranges: ranges of the axes.
        shapes: least, usual and largest shape of each input, in order.
        writer: of the engine.
        progress: shows the progress of the work.

    Raises:
        BackendError: torch-tensorrt failed.
    """
    ranges = ShapeRanges(**axis_ranges)
    weights = TorchWeights(torch, bundle, device)
    try:
        with prefer_fused_attention(device), progress.stage("tracing transition"):
            program = program_from_bundle(
                bundle, "transition", weights.select(list(weights)), device, ranges
            )
        with prefer_fused_attention(device), progress.stage("building with TensorRT"):
            _, dynamic = example_arguments(
                "transition", bundle.manifest.architecture, ranges, bundle.manifest.base, device
            )
            counts = compile_program(
                trt, program, shapes, dynamic, device, writer.folder / "transition.pt2"
            )
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())[:600]
        raise BackendError(
            f"torch-tensorrt cannot build {bundle.path} ({type(error).__name__}): {reason}"
        ) from error
    finally:
        weights.release()
    writer.add_existing("transition.pt2")
    return {"transition": counts}


def compile_program(
    trt: Any,
    program: ExportedProgram,
    shapes: Mapping[str, Shapes],
    dynamic: tuple[Any, ...],
    device: str,
    path: Path,
) -> str:
    """Compile and save one program, and return how many engines it became, in words.

    Args:
        trt: the torch_tensorrt module.
        program: recorded, on the device.
        shapes: see `build_package`.
        dynamic: torch's description of the axes.
        device: torch device.
        path: ends in .pt2.
    """
    assert program.example_inputs is not None
    examples = list(program.example_inputs[0])
    inputs = [
        trt.Input(
            min_shape=smallest, opt_shape=typical, max_shape=largest, dtype=example.dtype, name=name
        )
        for (name, (smallest, typical, largest)), example in zip(
            shapes.items(), examples, strict=True
        )
    ]
    module = trt.dynamo.compile(
        program,
        arg_inputs=inputs,
        device=torch.device(device),
        disable_tf32=True,
        min_block_size=1,
        immutable_weights=True,
        cache_built_engines=False,
        reuse_cached_engines=False,
    )
    trt.save(
        module,
        str(path),
        output_format="aot_inductor",
        retrace=True,
        arg_inputs=examples,
        dynamic_shapes=dynamic,
    )
    engines = sum("_run_on_acc" in name for name, _ in module.named_children())
    rest = sum("_run_on_gpu" in name for name, _ in module.named_children())
    return f"{engines} TensorRT engines, {rest} pieces left to torch"
