"""The table of types says of each library what that library says."""

from __future__ import annotations

from typing import get_args

import ml_dtypes  # noqa: F401 - gives numpy its bfloat16 and fp8
import numpy as np
import onnx
import pytest
import torch

from anyflow_deploy.bundle.manifest import TensorType
from anyflow_deploy.checkpoints.dtypes import BUNDLE_DTYPES, ONNX_DTYPES
from anyflow_deploy.dtypes import DTYPES, SAFETENSORS
from anyflow_deploy.precision import PRECISIONS


@pytest.mark.parametrize("name", DTYPES)
def test_a_row_has_the_size_that_torch_and_onnx_have(name: str) -> None:
    row = DTYPES[name]
    kind = getattr(torch, name)
    assert kind.itemsize == row.bytes
    if row.onnx is not None:
        number = onnx.TensorProto.DataType.Value(row.onnx)
        assert onnx.helper.tensor_dtype_to_np_dtype(number).itemsize == row.bytes
        assert np.dtype(name) == onnx.helper.tensor_dtype_to_np_dtype(number)


def test_every_table_is_a_part_of_it() -> None:
    assert set(get_args(TensorType)) <= {
        name for name, row in DTYPES.items() if row.onnx and row.tensorrt and row.triton
    }
    assert (
        {row.tensor_type for row in PRECISIONS.values()} <= set(BUNDLE_DTYPES) <= set(SAFETENSORS)
    )
    assert {name: str(kind) for name, kind in BUNDLE_DTYPES.items()} == {
        name: f"torch.{SAFETENSORS[name].name}" for name in BUNDLE_DTYPES
    }
    assert {name: kind.name for name, kind in ONNX_DTYPES.items()} == {
        name: SAFETENSORS[name].onnx for name in ONNX_DTYPES
    }


def test_safetensors_names_are_the_librarys() -> None:
    from safetensors.torch import save

    for name in ("float32", "bfloat16", "float8_e4m3fn", "int64", "uint8", "bool"):
        header = save({"x": torch.zeros(1, dtype=getattr(torch, name))})
        assert f'"dtype":"{DTYPES[name].safetensors}"'.encode() in header
