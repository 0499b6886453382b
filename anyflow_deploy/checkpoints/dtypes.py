"""Types of weights under their three names: torch's, safetensors' and ONNX's."""

from __future__ import annotations

import onnx_ir as ir
import torch

TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""safetensors -> torch: the types a checkpoint may be stored in."""

STORED = {**TORCH, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn}
"""safetensors -> torch: the types a bundle may store."""

SAFETENSORS = {kind: name for name, kind in STORED.items()}

ONNX = {
    "F32": ir.DataType.FLOAT,
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
    "I8": ir.DataType.INT8,
    "F8_E4M3": ir.DataType.FLOAT8E4M3FN,
}
"""safetensors -> ONNX: the types a graph may hold."""
