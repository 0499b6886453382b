"""Floating-point types under their three names: torch's, safetensors' and ONNX's."""

from __future__ import annotations

import onnx_ir as ir
import torch

TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""safetensors -> torch: the types a checkpoint may be stored in."""

SAFETENSORS = {kind: name for name, kind in TORCH.items()}

ONNX = {"F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16}
"""safetensors -> ONNX: the types a graph may hold."""
