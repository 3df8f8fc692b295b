"""Element conversions of weights, each rounded once, to nearest even; quantising is in `exporter/block_fp8.py`."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from angelforge.dtypes import DType

Array = npt.NDArray[Any]

_FLOATS = frozenset({DType.F32, DType.F16, DType.BF16})
_TARGETS = frozenset({DType.F32, DType.BF16})
_E4M3_VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)


def convertible(source: DType, target: DType) -> bool:
    """Whether weights stored as `source` can be written as `target` (F8_E4M3 takes its scales along)."""
    return source is target or (target in _TARGETS and (source in _FLOATS or source is DType.F8_E4M3))


def quantizable(source: DType) -> bool:
    """Whether weights stored as `source` can be quantised to F8_E4M3 in blocks."""
    return source in _FLOATS


def convert(values: Array, target: DType) -> Array:
    """f16, bf16 or f32 `values` as f32 or bf16; every float fits f32 exactly, so bf16 is rounded once."""
    with np.errstate(over="ignore", invalid="ignore"):  # the caller looks for what does not fit; NaN stays NaN
        return values.astype(np.float32, copy=False).astype(target.numpy, copy=False)


def dequantize(codes: Array, scales: Array, block_rows: Array, block_columns: Array, target: DType) -> Array:
    """weight = e4m3 · scale, rounded once to f32 or bf16.

    `codes` uint8 [rows, columns] hold the e4m3 bits; the scale of element (r, c) is `scales` f32 [.., ..] at
    (block_rows[r], block_columns[c]). A block has 256 possible weights, which are looked up.
    """
    tables = products(scales, target)  # [row blocks, column blocks, 256]
    index = np.add(codes, block_columns * 256, dtype=np.intp)  # [rows, columns]
    index += (block_rows * (tables.shape[1] * 256))[:, None]
    return np.take(tables.reshape(-1), index)


def products(scales: Array, target: DType) -> Array:
    """[.., 256]: all 256 e4m3 values times each of `scales` [..], rounded once to f32 or bf16.

    The product of 4 and 24 significant bits is exact in f64.
    """
    exact = scales[..., None] * _E4M3_VALUES
    with np.errstate(over="ignore"):
        rounded = exact.astype(np.float32)
    if target is not DType.F32:
        _leave_false_ties(rounded, exact)
    return convert(rounded, target)


def first_overflow(before: Array, after: Array) -> int | None:
    """The flat index of the first value that was finite `before` and is not `after`; None if there is none."""
    if _all_finite(after):
        return None
    with np.errstate(invalid="ignore"):  # signalling NaN
        created = ~np.isfinite(after) & np.isfinite(before)
    return int(created.argmax()) if created.any() else None


def _all_finite(values: Array) -> bool:
    if values.dtype == DType.BF16.numpy:  # its isfinite takes as long as the conversion itself
        return not bool(((values.view(np.uint16) & np.uint16(0x7F80)) == 0x7F80).any())
    return bool(np.isfinite(values).all())


def _leave_false_ties(rounded: Array, exact: Array) -> None:
    """Moves, in place, each f32 of `rounded` that lies half way between two bf16 while `exact` does not.

    One step towards `exact` makes the second rounding go where a single one would. Everywhere else two roundings give
    what one gives: rounding is monotonic and every midpoint of two bf16 is an f32.
    """
    bits = rounded.view(np.uint32).reshape(-1)
    ties = np.flatnonzero(bits & np.uint32(0xFFFF) == 0x8000)
    difference = np.abs(exact.reshape(-1)[ties]) - np.abs(rounded.reshape(-1)[ties].astype(np.float64))
    bits[ties] += np.sign(difference).astype(np.int32).view(np.uint32)  # adding 2^32 - 1 steps down
