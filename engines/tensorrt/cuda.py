"""A CUDA device through cuda-python: memory, streams, copies, captured graphs. No torch.

Every call of CUDA's runtime answers with an error code; `_check_call` turns one that is not success
into a `BackendError`. Work is queued on a stream of the caller's own, never on the default one
(TensorRT slows down there, and it cannot be captured). A host array handed to `upload` has to live
until the stream was waited for.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anyflow_deploy.engines.registry import BACKENDS
from anyflow_deploy.engines.tensorrt.library import chosen_library
from anyflow_deploy.errors import BackendError

try:
    from cuda.bindings import runtime as cuda
except ImportError as error:
    command = BACKENDS[chosen_library().backend].install_command("cuda")
    raise BackendError(f"cuda-python cannot be imported ({error}). Run: {command}") from None

ALIGNMENT = 256
"""Bytes that TensorRT wants a tensor's address to be a multiple of."""


class OutOfMemoryError(BackendError):
    """The device has no memory left."""


class CudaDevice:
    """One GPU.

    Args:
        index: as CUDA counts them.

    Attributes:
        integrated: its memory is the processor's, as on a Jetson.

    Raises:
        BackendError: no driver, or no such device.
    """

    def __init__(self, index: int = 0) -> None:
        count = _check_call(cuda.cudaGetDeviceCount(), "find a GPU")
        if not 0 <= index < count:
            raise BackendError(
                f"there is no CUDA device {index}: this machine has {count}, counted from 0."
            )
        self.index = index
        self.use()
        properties = _check_call(cuda.cudaGetDeviceProperties(index), "read the GPU's properties")
        name = properties.name
        self.name: str = (name.decode() if isinstance(name, bytes) else str(name)).strip("\x00 ")
        self.compute_capability: tuple[int, int] = (int(properties.major), int(properties.minor))
        self.integrated = bool(properties.integrated)

    def use(self) -> None:
        """Make it the calling thread's device; every thread starts on device 0."""
        _check_call(cuda.cudaSetDevice(self.index), f"use device {self.index}")

    @property
    def driver_version(self) -> str:
        """The version of CUDA that the driver has, as in "12.9"."""
        version = int(_check_call(cuda.cudaDriverGetVersion(), "ask for the driver's version"))
        return f"{version // 1000}.{version % 1000 // 10}"

    @property
    def memory_name(self) -> str:
        """Whose memory it is, for advice."""
        return (
            "the memory (processor and GPU share it; a desktop takes a gigabyte or more)"
            if self.integrated
            else "the GPU"
        )

    @property
    def streaming_advice(self) -> str:
        """The advice that helps only where the host has memory of its own."""
        return "" if self.integrated else ", or build with --weight-streaming"

    def memory(self) -> tuple[int, int]:
        """Bytes free and in all."""
        free, total = _check_call(cuda.cudaMemGetInfo(), "ask for the free memory")
        return int(free), int(total)

    def buffer(self, size: int) -> DeviceBuffer:
        """Memory of the device, not initialized.

        Raises:
            OutOfMemoryError: with what was asked for and what is free.
        """
        self.use()
        code, address = cuda.cudaMalloc(max(size, ALIGNMENT))
        if code == cuda.cudaError_t.cudaErrorMemoryAllocation:
            free, total = self.memory()
            raise OutOfMemoryError(
                f"{self.name} has no {size / 1e6:,.1f} MB left: {free / 1e6:,.1f} of"
                f" {total / 1e6:,.1f} MB are free. Close what else uses {self.memory_name}, make"
                f" smaller or shorter videos{self.streaming_advice}."
            )
        return DeviceBuffer(_check_call((code, address), "reserve memory"), size)

    def stream(self) -> CudaStream:
        """A stream of its own."""
        self.use()
        return CudaStream(self)


class DeviceBuffer:
    """A piece of device memory, given back by `close` or when nobody holds it.

    Attributes:
        address: on the device, a multiple of `ALIGNMENT`.
        size: in bytes.
    """

    def __init__(self, address: int, size: int) -> None:
        self.address, self.size = int(address), size
        self._free = weakref.finalize(self, cuda.cudaFree, self.address)

    def close(self) -> None:
        """Give the memory back; the device has to be done with it."""
        self._free()


class CudaStream:
    """A CUDA stream: what is put on it happens in order, some time later.

    Attributes:
        handle: the number that TensorRT knows the stream by.
    """

    def __init__(self, device: CudaDevice) -> None:
        self._device = device
        self._stream = _check_call(
            cuda.cudaStreamCreateWithFlags(cuda.cudaStreamNonBlocking), "make a stream"
        )
        self.handle = int(self._stream)
        self._free = weakref.finalize(self, cuda.cudaStreamDestroy, self._stream)

    def upload(self, address: int, array: NDArray[Any]) -> None:
        """Copy a contiguous array to the device."""
        self._copy(
            address, array.ctypes.data, array.nbytes, cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        )

    def download(self, address: int, array: NDArray[Any]) -> None:
        """Copy from the device into a contiguous array; it is there after `wait`."""
        self._copy(
            array.ctypes.data, address, array.nbytes, cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        )

    def copy(self, to: int, start: int, size: int) -> None:
        """Copy within the device. The places may overlap: CUDA does not define that, so it goes
        piece by piece then."""
        gap = abs(to - start)
        piece = size if gap >= size or not gap else gap
        offsets = range(0, size, max(piece, 1))
        for offset in offsets if to <= start else reversed(offsets):
            count = min(piece, size - offset)
            self._copy(
                to + offset, start + offset, count, cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
            )

    def _copy(self, to: int, start: int, size: int, kind: Any) -> None:
        if size and to != start:
            _check_call(cuda.cudaMemcpyAsync(to, start, size, kind, self._stream), "copy")

    def synchronize(self) -> None:
        """Until everything put on the stream has happened."""
        _check_call(cuda.cudaStreamSynchronize(self._stream), "finish the work on the GPU")

    def capture(self, enqueue: Callable[[], None]) -> CudaGraph:
        """Record what `work` puts on the stream, without doing it."""
        _check_call(
            cuda.cudaStreamBeginCapture(
                self._stream, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
            ),
            "capture",
        )
        try:
            enqueue()
        except BaseException:
            # This leaves the stream usable; its own error follows from the first one.
            cuda.cudaStreamEndCapture(self._stream)
            raise
        graph = _check_call(cuda.cudaStreamEndCapture(self._stream), "capture a CUDA graph")
        try:
            return CudaGraph(
                _check_call(cuda.cudaGraphInstantiate(graph, 0), "instantiate a CUDA graph"),
                self._stream,
            )
        finally:
            cuda.cudaGraphDestroy(graph)

    def close(self) -> None:
        """Give the stream back."""
        self._free()

    def __enter__(self) -> CudaStream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.synchronize()
        self.close()


class CudaGraph:
    """Work that was captured, to be done again by one call."""

    def __init__(self, executable: Any, stream: Any) -> None:
        self._executable, self._stream = executable, stream
        self._free = weakref.finalize(self, cuda.cudaGraphExecDestroy, executable)

    def launch(self) -> None:
        """Put it on its stream once more."""
        _check_call(cuda.cudaGraphLaunch(self._executable, self._stream), "launch a CUDA graph")

    def close(self) -> None:
        """Release it."""
        self._free()


def count_elements(shape: tuple[int, ...]) -> int:
    """How many numbers a tensor of this shape holds."""
    return int(np.prod(shape, dtype=np.int64))


def _check_call(result: tuple[Any, ...], action: str) -> Any:
    """What a call of CUDA's runtime returned, without its error code.

    Raises:
        BackendError: the code is not success.
    """
    code, *values = result
    if code != cuda.cudaError_t.cudaSuccess:
        _, text = cuda.cudaGetErrorString(code)
        message = text.decode() if isinstance(text, bytes) else str(text)
        raise BackendError(f"CUDA could not {action}: {message} ({getattr(code, 'name', code)}).")
    return values[0] if len(values) == 1 else tuple(values)
