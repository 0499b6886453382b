"""Build a network straight into a file.

A plan is as large as the weights. Newer releases write it piece by piece, so that it is never whole
in memory: a build of a six-layer model of 0.65 GB peaked at 1.06 GB instead of 1.55 GB (TensorRT
for RTX 1.7.1, without a GPU). TensorRT 10.3 can only return it whole.
"""

from __future__ import annotations

from typing import Any, cast

from anyflow_deploy.bundle.atomic_io import HashingFile
from anyflow_deploy.engines.tensorrt.api import trt

_IStreamWriter: Any = getattr(trt, "IStreamWriter", None)


def build_into(
    builder: trt.Builder,
    network: trt.INetworkDefinition,
    config: trt.IBuilderConfig,
    to: HashingFile,
) -> bool:
    """Build a network and write its plan.

    Args:
        builder, network, config: TensorRT's.
        to: an empty file.

    Returns:
        Whether TensorRT built it; if not, its log says why.

    Raises:
        OSError: the file cannot be written.
    """
    if _IStreamWriter is None:
        plan = builder.build_serialized_network(network, config)
        if plan is not None:
            # IHostMemory is a buffer, which its stub does not say.
            to.write(memoryview(cast(Any, plan)))
        return plan is not None
    writer = _stream_writer(to)
    built = cast(Any, builder).build_serialized_network_to_stream(network, config, writer)
    if writer.error is not None:
        raise writer.error
    return bool(built)


def _stream_writer(file: HashingFile) -> Any:
    """Return TensorRT's IStreamWriter for a file; `error` is what a write raised."""

    class StreamWriter(_IStreamWriter):  # type: ignore[misc]
        """Passes pieces of a plan on to a file."""

        def __init__(self) -> None:
            _IStreamWriter.__init__(self)
            self.error: BaseException | None = None

        def write(self, data: Any) -> int:
            """Take a piece; TensorRT stops the build when fewer bytes are taken."""
            piece = memoryview(data)
            try:
                file.write(piece)
            except BaseException as error:  # noqa: BLE001 - there is C++ around this
                self.error = error
                return 0
            return piece.nbytes

    return StreamWriter()
