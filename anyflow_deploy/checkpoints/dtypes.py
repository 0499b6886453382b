"""Types of weights in torch and in ONNX, by the safetensors names of `dtypes.py`."""

from __future__ import annotations

import onnx_ir as ir
import torch

from anyflow_deploy.dtypes import SAFETENSORS


def _torch_dtypes(*names: str) -> dict[str, torch.dtype]:
    return {name: getattr(torch, SAFETENSORS[name].name) for name in names}


CHECKPOINT_DTYPES = _torch_dtypes("F64", "F32", "F16", "BF16")
"""safetensors -> torch: the types a checkpoint may be stored in."""

BUNDLE_DTYPES = {**CHECKPOINT_DTYPES, **_torch_dtypes("I8", "F8_E4M3")}
"""safetensors -> torch: the types a bundle may store."""

SAFETENSORS_NAMES = {kind: name for name, kind in BUNDLE_DTYPES.items()}

ONNX_DTYPES = {
    name: ir.DataType[str(SAFETENSORS[name].onnx)]
    for name in ("F32", "F16", "BF16", "I8", "F8_E4M3")
}
"""safetensors -> ONNX: the types a graph may hold."""
