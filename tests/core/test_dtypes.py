"""Element types: the same type in safetensors, ONNX and NumPy."""

import numpy as np
import onnx
import onnx.helper
import pytest

from angelforge.dtypes import DType
from angelforge.errors import AngelForgeError

ONNX_NAMES = {
    "F64": "DOUBLE",
    "F32": "FLOAT",
    "F16": "FLOAT16",
    "BF16": "BFLOAT16",
    "F8_E4M3": "FLOAT8E4M3FN",
    "I64": "INT64",
    "I32": "INT32",
    "I16": "INT16",
    "I8": "INT8",
    "U8": "UINT8",
    "BOOL": "BOOL",
}


@pytest.mark.parametrize("dtype", DType)
def test_onnx_value_is_that_of_onnx(dtype):
    assert dtype.onnx == onnx.TensorProto.DataType.Value(ONNX_NAMES[dtype.value])


@pytest.mark.parametrize("dtype", DType)
def test_numpy_type_is_the_one_onnx_uses(dtype):
    assert dtype.numpy == onnx.helper.tensor_dtype_to_np_dtype(dtype.onnx)
    assert dtype.itemsize == np.empty(3, dtype.numpy).nbytes // 3


@pytest.mark.parametrize("dtype", DType)
def test_code_leads_back_to_the_type(dtype):
    assert DType.from_code(dtype.value) is dtype


@pytest.mark.parametrize("code", ["F4", "f32", "", "F8_E5M2"])
def test_unknown_code_is_refused_with_the_known_ones(code):
    with pytest.raises(AngelForgeError, match=r"not supported; expected one of .*BF16"):
        DType.from_code(code)
