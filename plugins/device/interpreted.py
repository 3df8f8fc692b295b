"""Triton's interpreter with the numbers of a GPU: kernels then compute on CPU tensors what they compute there.

The interpreter's own conversions are wrong (Triton 3.6 to 3.8: f32 → bf16 truncates; f32 → e4m3 loses the carry and
does not saturate). A GPU rounds to nearest even and saturates e4m3 to ±448, and so do these. Its dot multiplies the
bits of bf16 values as integers; here it multiplies their values in f32.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np
import triton.language as tl
from triton.runtime import interpreter

NUMPY_TYPES = {
    tl.float64: np.dtype(np.float64),
    tl.float32: np.dtype(np.float32),
    tl.float16: np.dtype(np.float16),
    tl.bfloat16: np.dtype(ml_dtypes.bfloat16),
    tl.float8e4nv: np.dtype(ml_dtypes.float8_e4m3fn),
    tl.float8e5: np.dtype(ml_dtypes.float8_e5m2),
}
_SATURATING = {tl.float8e4nv: 448.0, tl.float8e5: 57344.0}


def convert_float(values: np.ndarray, source: tl.dtype, target: tl.dtype, rounding_mode: Any) -> np.ndarray:
    """Bits of `values` (typed or as bits) in the type `target`: rounded to nearest even, FP8 saturated, NaN kept."""
    if rounding_mode not in (None, interpreter._ir.ROUNDING_MODE.RTNE):
        raise ValueError(f"no conversion with the rounding mode {rounding_mode}")
    exact = np.float64 if source == tl.float64 else np.float32
    wide = np.ascontiguousarray(values).view(NUMPY_TYPES[source]).astype(exact)
    if target in _SATURATING:
        wide = np.clip(wide, -_SATURATING[target], _SATURATING[target])
    with np.errstate(over="ignore", invalid="ignore"):
        return wide.astype(NUMPY_TYPES[target]).view(f"u{NUMPY_TYPES[target].itemsize}").reshape(np.shape(values))


def dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    """a · b + d in the accumulator's type; narrow operands are widened exactly."""
    left, right = (
        np.asarray(x.data).view(NUMPY_TYPES.get(x.dtype.scalar, x.data.dtype)).astype(d.data.dtype) for x in (a, b)
    )
    return interpreter.TensorHandle(np.matmul(left, right) + d.data, d.dtype.scalar)


@contextmanager
def exact_numbers(multiply: Callable[..., Any] = dot) -> Iterator[None]:
    """Within it the interpreter computes as a GPU does; `multiply` is its tl.dot."""
    builder = interpreter.InterpreterBuilder
    before = interpreter._convert_float, builder.create_dot, interpreter._patch_lang
    patch_lang, patched = interpreter._patch_lang, set()

    def patch_once(function: Any) -> Any:
        """The language's functions are replaced at the kernel's start, not again for every device function."""
        languages = frozenset(id(value) for value in function.__globals__.values() if value is tl or value is tl.core)
        if languages in patched:
            return interpreter._LangPatchScope()
        patched.add(languages)
        return patch_lang(function)

    interpreter._convert_float, builder.create_dot, interpreter._patch_lang = convert_float, multiply, patch_once
    try:
        with np.errstate(all="ignore"):
            yield
    finally:
        interpreter._convert_float, builder.create_dot, interpreter._patch_lang = before
