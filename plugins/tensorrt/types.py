"""Element types as ONNX and TensorRT name them."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import onnx_ir as ir

_NAMES = {
    "FLOAT": "FLOAT",
    "FLOAT16": "HALF",
    "BFLOAT16": "BF16",
    "FLOAT8E4M3FN": "FP8",
    "INT32": "INT32",
    "INT64": "INT64",
    "INT8": "INT8",
    "UINT8": "UINT8",
    "BOOL": "BOOL",
}


def to_tensorrt(api: Any, dtype: ir.DataType) -> Any:
    """TensorRT's DataType. Raises ValueError for one that TensorRT lacks."""
    if dtype.name not in _NAMES:
        raise ValueError(f"TensorRT has no element type {dtype.name}")
    return getattr(api.DataType, _NAMES[dtype.name])


def from_tensorrt(api: Any, dtype: Any) -> ir.DataType:
    """ONNX's name of a TensorRT DataType. Raises ValueError for one that no operator uses."""
    found = _by_tensorrt_type(api).get(dtype)
    if found is None:
        raise ValueError(f"no operator takes TensorRT's element type {dtype.name}")
    return found


@cache
def _by_tensorrt_type(api: Any) -> Mapping[Any, ir.DataType]:
    return {getattr(api.DataType, other): ir.DataType[name] for name, other in _NAMES.items()}
