"""CUDA's runtime without a GPU: device memory is ordinary memory, and a stream does nothing until
it is waited for.

The module has the functions, parameters and enums of a real release of cuda-python
(tools/cuda_surface.py). It is stricter than a GPU: new memory holds NaN, a copy may not leave what
was reserved or overlap itself, memory in use cannot be freed twice, and work is done as late as
CUDA may do it, so that a forgotten wait shows. Captured work is done when the graph is launched,
once for every launch.
"""

from __future__ import annotations

import ctypes
import enum
import inspect
import types
from collections.abc import Callable
from typing import Any

import numpy as np

StreamWork = Callable[[], None]


class Handle(int):
    """cudaStream_t and the like: an object that is also a number."""


class FakeCuda(types.ModuleType):
    """`cuda.bindings.runtime`.

    Attributes:
        properties: what `cudaGetDeviceProperties` says.
        limit: bytes that can be reserved in all.
        calls: names of the functions called.
        launches: how many graphs were launched.
        driver: CUDA's version that the driver has, as it is counted there.
    """

    def __init__(self, surface: dict[str, Any]) -> None:
        super().__init__("cuda.bindings.runtime")
        self._surface = surface
        for name, members in surface["enums"].items():
            setattr(self, name, enum.IntEnum(name, members))
        for name, value in surface["constants"].items():
            setattr(self, name, value)
        for name, parameters in surface["functions"].items():
            setattr(self, name, self._function(name, parameters))
        self.properties = {"name": b"NVIDIA Stand-in", "major": 9, "minor": 0, "integrated": 0}
        self.limit = 4 << 30
        self.devices = 1
        self.driver = 12090
        self.calls: list[str] = []
        self.launches = 0
        self._memory: dict[int, Any] = {}
        self._streams: dict[int, list[StreamWork]] = {}
        self._captures: dict[int, list[StreamWork]] = {}
        self._graphs: dict[int, tuple[int, list[StreamWork]]] = {}
        self._next = 16

    def _function(self, name: str, parameters: list[str]) -> Callable[..., Any]:
        signature = inspect.Signature(
            [inspect.Parameter(p, inspect.Parameter.POSITIONAL_OR_KEYWORD) for p in parameters]
        )

        def function(*arguments: Any, **named: Any) -> Any:
            bound = signature.bind(*arguments, **named)
            self.calls.append(name)
            act = getattr(self, f"_{name}", None)
            if act is None:
                raise AssertionError(f"the stand-in has no behaviour for {name}")
            values = act(*bound.arguments.values())
            return values if isinstance(values, tuple) else (self.cudaError_t.cudaSuccess, values)

        return function

    # memory

    def reserved_bytes(self) -> int:
        """Bytes reserved now."""
        return sum(len(memory) for memory in self._memory.values())

    def _cudaMalloc(self, size: int) -> Any:  # noqa: N802 - CUDA's names
        if self.reserved_bytes() + size > self.limit:
            return self.cudaError_t.cudaErrorMemoryAllocation, 0
        raw = np.full(size + 512, 0xFF, np.uint8)
        address = -(-raw.ctypes.data // 256) * 256
        self._memory[address] = raw[address - raw.ctypes.data :][:size]
        return address

    def _cudaFree(self, address: int) -> Any:  # noqa: N802
        if self._memory.pop(address, None) is None:
            raise AssertionError(f"{address:#x} was freed before, or never reserved")
        return (self.cudaError_t.cudaSuccess,)

    def view(self, address: int, size: int) -> Any:
        """Device memory as bytes; fails if any of it is not reserved."""
        for base, memory in self._memory.items():
            if base <= address and address + size <= base + len(memory):
                return memory[address - base :][:size]
        raise AssertionError(
            f"{size} bytes at {address:#x} lie outside the memory reserved on the device"
        )

    def _cudaMemGetInfo(self) -> Any:  # noqa: N802
        return self.cudaError_t.cudaSuccess, self.limit - self.reserved_bytes(), self.limit

    def _cudaMemcpyAsync(self, dst: int, src: int, count: int, kind: Any, stream: int) -> Any:  # noqa: N802
        def copy() -> None:
            to = self.view(dst, count) if kind in (1, 3) else None
            start = self.view(src, count) if kind in (2, 3) else None
            if kind == 3 and abs(dst - src) < count:
                raise AssertionError("a copy within the device overlaps itself")
            ctypes.memmove(
                dst if to is None else to.ctypes.data,
                src if start is None else start.ctypes.data,
                count,
            )

        self.enqueue(stream, copy)
        return (self.cudaError_t.cudaSuccess,)

    # devices

    def _cudaGetDeviceCount(self) -> Any:  # noqa: N802
        if not self.devices:
            return self.cudaError_t.cudaErrorInsufficientDriver, None
        return self.devices

    def _cudaGetDeviceProperties(self, device: int) -> Any:  # noqa: N802
        unknown = set(self.properties) - set(self._surface["structures"]["cudaDeviceProp"])
        assert not unknown, f"cudaDeviceProp has no {unknown}"
        return types.SimpleNamespace(**self.properties)

    def _cudaDriverGetVersion(self) -> Any:  # noqa: N802
        return self.driver

    def _cudaSetDevice(self, device: int) -> Any:  # noqa: N802
        return (self.cudaError_t.cudaSuccess,)

    def _cudaGetErrorString(self, error: Any) -> Any:  # noqa: N802
        return f"{error.name} in words".encode()

    # streams and graphs

    def enqueue(self, stream: int, work: StreamWork) -> None:
        """Queue work on a stream, or note it in the graph that is being captured."""
        assert int(stream) in self._streams, "no such stream, or the default one"
        captured = self._captures.get(int(stream))
        (self._streams[int(stream)] if captured is None else captured).append(work)

    def capturing(self, stream: int) -> bool:
        """Whether a stream's work is being noted instead of done."""
        return int(stream) in self._captures

    def _handle(self) -> Handle:
        self._next += 1
        return Handle(self._next)

    def _cudaStreamCreateWithFlags(self, flags: int) -> Any:  # noqa: N802
        assert flags == self.cudaStreamNonBlocking
        handle = self._handle()
        self._streams[handle] = []
        return handle

    def _cudaStreamDestroy(self, stream: int) -> Any:  # noqa: N802
        assert not self._streams.pop(stream), "a stream with work on it was destroyed"
        return (self.cudaError_t.cudaSuccess,)

    def _cudaStreamSynchronize(self, stream: int) -> Any:  # noqa: N802
        assert not self.capturing(stream), "waiting is not allowed while a stream is captured"
        waiting, self._streams[stream] = self._streams[stream], []
        for work in waiting:
            work()
        return (self.cudaError_t.cudaSuccess,)

    def _cudaStreamBeginCapture(self, stream: int, mode: Any) -> Any:  # noqa: N802
        self._captures[stream] = []
        return (self.cudaError_t.cudaSuccess,)

    def _cudaStreamEndCapture(self, stream: int) -> Any:  # noqa: N802
        handle = self._handle()
        self._graphs[handle] = (stream, self._captures.pop(stream))
        return handle

    def _cudaGraphInstantiate(self, graph: int, flags: int) -> Any:  # noqa: N802
        handle = self._handle()
        self._graphs[handle] = self._graphs[graph]
        return handle

    def _cudaGraphDestroy(self, graph: int) -> Any:  # noqa: N802
        del self._graphs[graph]
        return (self.cudaError_t.cudaSuccess,)

    def _cudaGraphExecDestroy(self, graph: int) -> Any:  # noqa: N802
        del self._graphs[graph]
        return (self.cudaError_t.cudaSuccess,)

    def _cudaGraphLaunch(self, graph: int, stream: int) -> Any:  # noqa: N802
        self.launches += 1
        for work in self._graphs[graph][1]:
            self.enqueue(stream, work)
        return (self.cudaError_t.cudaSuccess,)
