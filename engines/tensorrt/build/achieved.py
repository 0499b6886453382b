"""What opened engines hold, against what their graphs ask for; the list itself is read by
`inspector`."""

from __future__ import annotations

from anyflow_deploy.bundle.bundle import Bundle
from anyflow_deploy.engines.tensorrt.api import LIBRARY, TITLE, trt
from anyflow_deploy.engines.tensorrt.build.inspector import (
    PrecisionReport,
    expected_precision,
    update_report,
)
from anyflow_deploy.errors import BackendError


def inspect_layers(engine: trt.ICudaEngine) -> str:
    """Return what TensorRT's inspector says of an engine, as JSON."""
    inspector = engine.create_engine_inspector()
    return inspector.get_engine_information(trt.LayerInformationFormat.JSON)


def add_graph(report: PrecisionReport, bundle: Bundle, graph: str, layers: str) -> None:
    """Add the layers of one graph to a report.

    Args:
        report: what is added to.
        bundle: the engine's.
        graph: a name in its manifest.
        layers: from `inspect_layers`.
    """
    import onnx

    path = bundle.file(bundle.manifest.graphs[graph].file)
    model = onnx.load(str(path), load_external_data=False)
    update_report(report, layers, expected_precision(model))


def check_shortfall(shortfall: str | None, device: str, allow_fallback: bool) -> None:
    """Refuse engines that run eight-bit layers in a wider type, unless that was allowed.

    Args:
        shortfall: from `PrecisionReport`; None: there is none.
        device: name of the GPU.
        allow_fallback: as the build was told.

    Raises:
        BackendError: with what to do.
    """
    if shortfall is None or allow_fallback:
        return
    other = " or --optimization-level 5" if LIBRARY.times_kernels else ""
    raise BackendError(
        f"{TITLE} on {device}: {shortfall}. Keep such an engine with --allow-fallback, try another"
        f" {LIBRARY.title}{other}, or export in a precision without quantization."
    )
