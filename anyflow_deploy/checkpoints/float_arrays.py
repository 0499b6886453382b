"""Widen every float type of safetensors to float32, with numpy alone.

numpy has no bfloat16 and no eight-bit floats, and a device need not have torch. bfloat16 is the
upper half of a float32; of the eight-bit types a table has all 256 values. Their layouts are those
of the ONNX and OCP specifications: sign, exponent, mantissa, and a bias.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from anyflow_deploy.checkpoints.safetensors_stream import TensorEntry, read_bytes

_PLAIN = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}

_EIGHT_BIT = {
    "F8_E4M3": (4, 3, 7, "one nan"),
    "F8_E5M2": (5, 2, 15, "ieee"),
    "F8_E4M3FNUZ": (4, 3, 8, "negative zero"),
    "F8_E5M2FNUZ": (5, 2, 16, "negative zero"),
}
"""safetensors name -> bits of the exponent, bits of the mantissa, bias, and which codes are not
finite: the IEEE ones, the last one of each sign, or the code of negative zero."""

FLOAT_TYPES = (*_PLAIN, "BF16", *_EIGHT_BIT, "F8_E8M0")
"""The types that can be read, as headers name them."""


def read_float32(path: Path, entry: TensorEntry) -> NDArray[np.float32]:
    """Read one tensor of a .safetensors file as float32, in its shape.

    Args:
        path: the file.
        entry: of its header, with one of `FLOAT_TYPES`.

    Raises:
        CheckpointError: the file ends in the middle of the tensor.
    """
    data = read_bytes(path, entry)
    return float32_from_bytes(entry.type, data).reshape(entry.shape)


def float32_from_bytes(kind: str, data: bytes | bytearray) -> NDArray[np.float32]:
    """Widen little-endian numbers of one of `FLOAT_TYPES`; float64 is rounded."""
    if kind in _PLAIN:
        return np.frombuffer(data, _PLAIN[kind]).astype(np.float32)
    if kind == "BF16":
        wide = np.frombuffer(data, "<u2").astype(np.uint32) << 16
        return wide.view(np.float32)
    return _values(kind)[np.frombuffer(data, np.uint8)]


@functools.cache
def _values(kind: str) -> NDArray[np.float32]:
    """All 256 values of an eight-bit type, by their code."""
    code = np.arange(256)
    if kind == "F8_E8M0":
        return np.asarray(np.where(code == 255, np.nan, np.ldexp(1.0, code - 127)), np.float32)
    exponent_bits, mantissa_bits, bias, not_finite = _EIGHT_BIT[kind]
    exponent = (code >> mantissa_bits) & ((1 << exponent_bits) - 1)
    mantissa = code & ((1 << mantissa_bits) - 1)
    is_normal = exponent > 0
    significand = np.where(is_normal, mantissa + (1 << mantissa_bits), mantissa)
    power = np.maximum(exponent, 1) - bias - mantissa_bits
    values = np.ldexp(significand.astype(float), power) * np.where(code & 0x80, -1.0, 1.0)
    if not_finite == "one nan":
        values[(code & 0x7F) == 0x7F] = np.nan
    elif not_finite == "negative zero":
        values[code == 0x80] = np.nan
    else:
        is_last = exponent == (1 << exponent_bits) - 1
        values[is_last & (mantissa > 0)] = np.nan
        values[is_last & (mantissa == 0)] *= np.inf
    return np.asarray(values, np.float32)
