"""The device that holds a session's buffers, and copies to and within it."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


class OrtDevice:
    """The device that holds a session's buffers."""

    def __init__(self, runtime: Any, name: str, index: int = 0) -> None:
        self._value = runtime.OrtValue
        self.name = name
        self.index = index

    def upload(self, array: NDArray[Any]) -> Any:
        """Return a buffer with the contents of an array."""
        return self._value.ortvalue_from_numpy(array, self.name, self.index)

    def empty(self, shape: Sequence[int], dtype: np.dtype[Any]) -> Any:
        """Return an uninitialized buffer of a shape."""
        return self._value.ortvalue_from_shape_and_type(list(shape), dtype, self.name, self.index)

    def move(self, target: Any, to: int, source: Any, start: int, count: int) -> None:
        """Copy `count` bytes from one buffer to another, or within one buffer.

        `to` and `start` are offsets in bytes; the two pieces may overlap.
        """
        if self.name == "cpu":
            ctypes.memmove(target.data_ptr() + to, source.data_ptr() + start, count)
            return
        host = np.array(target.numpy())  # ONNX Runtime's Python interface copies whole buffers only
        piece = np.array(source.numpy()).view(np.uint8).reshape(-1)[start : start + count]
        host.view(np.uint8).reshape(-1)[to : to + count] = piece
        target.update_inplace(host)
