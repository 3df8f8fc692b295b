"""Element types: one enum for safetensors codes, ONNX element types, NumPy types and item sizes."""

from __future__ import annotations

from enum import Enum
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np

from angelforge.errors import AngelForgeError


class DType(Enum):
    """An element type of a tensor; the value is its code in a safetensors header."""

    F64 = "F64"
    F32 = "F32"
    F16 = "F16"
    BF16 = "BF16"
    F8_E4M3 = "F8_E4M3"
    I64 = "I64"
    I32 = "I32"
    I16 = "I16"
    I8 = "I8"
    U8 = "U8"
    BOOL = "BOOL"

    @cached_property
    def numpy(self) -> np.dtype[Any]:
        """The NumPy type; BF16 and F8_E4M3 are those of ml_dtypes."""
        result: np.dtype[Any] = np.dtype(_NUMPY[self.value])
        return result

    @cached_property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return int(self.numpy.itemsize)

    @property
    def onnx(self) -> int:
        """The element type in ONNX (a value of `onnx.TensorProto.DataType`)."""
        return _ONNX[self.value]

    @classmethod
    def from_code(cls, code: str) -> DType:
        """The type of a safetensors code.

        Raises AngelForgeError for a code that this project does not use (sub-byte types, F8_E5M2, unsigned 16 bit …).
        """
        try:
            return cls(code)
        except ValueError:
            known = ", ".join(t.value for t in cls)
            raise AngelForgeError(f"Element type {code!r} is not supported; expected one of {known}.") from None


_NUMPY: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}

# Written as numbers so that reading a header does not import onnx; a test compares them with onnx.TensorProto.
_ONNX = {
    "F64": 11,
    "F32": 1,
    "F16": 10,
    "BF16": 16,
    "F8_E4M3": 17,
    "I64": 7,
    "I32": 6,
    "I16": 5,
    "I8": 3,
    "U8": 2,
    "BOOL": 9,
}
