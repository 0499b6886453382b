"""Types of numbers, and their name in each library.

One row for each type. numpy, torch, safetensors, ONNX, TensorRT and Triton have a name of their own
for it, and code that translates between two of them reads both names here. This module imports none
of these libraries: it has their names, and `checkpoints/dtypes.py` torch's and ONNX's objects.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DType:
    """One row of the table. A name is None if the library has none, or if nothing needs it.

    Attributes:
        name: the manifest's and numpy's name, and torch's attribute (numpy has no bfloat16 and
            fp8).
        bytes: size of one number.
        safetensors: as in the header of a file.
        onnx: member of `onnx.TensorProto.DataType`.
        tensorrt: member of `tensorrt.DataType`.
        triton: in a model's configuration, after `TYPE_`.
        onnxruntime: in a profile of ONNX Runtime.
    """

    name: str
    bytes: int
    safetensors: str | None = None
    onnx: str | None = None
    tensorrt: str | None = None
    triton: str | None = None
    onnxruntime: str | None = None


DTYPES = {
    row.name: row
    for row in (
        DType("float64", 8, "F64", "DOUBLE", onnxruntime="double"),
        DType("float32", 4, "F32", "FLOAT", "FLOAT", "FP32", "float"),
        DType("float16", 2, "F16", "FLOAT16", "HALF", "FP16", "float16"),
        DType("bfloat16", 2, "BF16", "BFLOAT16", "BF16", "BF16", "bfloat16"),
        DType("float8_e4m3fn", 1, "F8_E4M3", "FLOAT8E4M3FN"),
        DType("float8_e5m2", 1, "F8_E5M2"),
        DType("float8_e8m0fnu", 1, "F8_E8M0"),
        DType("float8_e4m3fnuz", 1, "F8_E4M3FNUZ"),
        DType("float8_e5m2fnuz", 1, "F8_E5M2FNUZ"),
        DType("complex64", 8, "C64"),
        DType("int64", 8, "I64", "INT64", "INT64", "INT64", "int64"),
        DType("int32", 4, "I32", onnxruntime="int32"),
        DType("int16", 2, "I16"),
        DType("int8", 1, "I8", "INT8", onnxruntime="int8"),
        DType("uint64", 8, "U64"),
        DType("uint32", 4, "U32"),
        DType("uint16", 2, "U16"),
        DType("uint8", 1, "U8", onnxruntime="uint8"),
        DType("bool", 1, "BOOL", onnxruntime="bool"),
    )
}

SAFETENSORS = {row.safetensors: row for row in DTYPES.values() if row.safetensors}
"""Name in a safetensors header -> row."""
