"""Values that no weight can have, found in what is read of a checkpoint: NaN, infinity, scales that are not above 0.

Every byte of a checkpoint passes here, so that two passes over a piece that the cache holds are all it may cost.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from angelforge.config import Quantization
from angelforge.dtypes import DType
from angelforge.errors import AngelForgeError
from angelforge.exporter.openfiles import OpenFiles
from angelforge.tensorfile import TensorInfo

Array = npt.NDArray[Any]

_PIECE = 1 << 18  # bytes looked at a time: a core's own cache holds them for the second pass
# The bits of a positive value, from which on it is infinite or NaN (e4m3 has no infinity).
_NOT_FINITE = {DType.F8_E4M3: 0x7F, DType.F16: 0x7C00, DType.BF16: 0x7F80, DType.F32: 0x7F800000}


def refuse_damage(info: TensorInfo, data: Array, start: int, files: OpenFiles, codes: TensorInfo | None) -> None:
    """Looks through `data` uint8, what stands in the tensor `info` from byte `start` on; integers pass.

    Where `info` is the f32 block scales of FP8 weights, those are `codes`. Then each must be above 0 too, or 0 where
    the weights of its block are. Raises AngelForgeError naming tensor and position.
    """
    first = start // info.dtype.itemsize
    if codes is None or info.dtype is not DType.F32:
        _refuse_weights(info, data, first)
    else:
        _refuse_scales(info, data, first, codes, files)


def _refuse_weights(info: TensorInfo, data: Array, first: int) -> None:
    found = first_not_finite(data, info.dtype) if info.dtype in _NOT_FINITE else None
    if found is not None:
        raise _damaged(info, first + found, data.view(info.dtype.numpy)[found], "which no weight can be")


def _refuse_scales(info: TensorInfo, data: Array, first: int, codes: TensorInfo, files: OpenFiles) -> None:
    bits = data.view(np.int32)
    if len(bits) == 0 or (bits.min() > 0 and bits.max() < _NOT_FINITE[DType.F32]):
        return
    scales = data.view(np.float32)
    with np.errstate(invalid="ignore"):  # signalling NaN
        wrong = np.flatnonzero(~((scales >= 0) & (scales < np.inf)))
    if wrong.size:
        raise _damaged(info, first + int(wrong[0]), scales[wrong[0]], "but a scale is finite and above 0")
    rows, columns = np.divmod(first + np.flatnonzero(scales == 0), info.shape[1])
    for row in np.unique(rows):
        used = _blocks_used(codes, int(row), files)
        if (lost := columns[(rows == row) & used[columns]]).size:
            raise _damaged(info, int(row * info.shape[1] + lost[0]), 0.0, "but the weights of its block are not")


def first_not_finite(data: Array, dtype: DType) -> int | None:
    """The index of the first element of `data` uint8, the bytes of `dtype`, that is NaN or infinite, if there is one.

    As unsigned numbers the bits of negative ones are the largest, as signed numbers those of positive ones.
    """
    least = _NOT_FINITE[dtype]
    bits = data.view(f"u{dtype.itemsize}")
    negative = least | 1 << 8 * dtype.itemsize - 1
    size = _PIECE // dtype.itemsize
    for start in range(0, len(bits), size):
        piece = bits[start : start + size]
        signed = piece.view(f"i{dtype.itemsize}")
        if np.maximum.reduce(piece) >= negative or np.maximum.reduce(signed) >= least:
            return start + int(((piece >= negative) | (signed >= least)).argmax())
    return None


def _blocks_used(codes: TensorInfo, row: int, files: OpenFiles) -> Array:
    """bool [column blocks]: which blocks of a row of blocks hold a weight that is not 0 (of either sign)."""
    (height, width), (total, columns) = Quantization().block, codes.shape
    strip = np.empty((min(height, total - row * height), columns), np.uint8)
    files.read(codes.path, strip.reshape(-1).data, codes.offset + row * height * columns)
    any_set = np.bitwise_or.reduce(strip & np.uint8(0x7F), axis=0)  # [columns]
    return np.bitwise_or.reduceat(any_set, np.arange(0, columns, width)) != 0


def _damaged(info: TensorInfo, index: int, value: Any, why: str) -> AngelForgeError:
    place = [int(i) for i in np.unravel_index(index, info.shape)]
    return AngelForgeError(
        f"{info.name} at {place} is {float(value):g}, {why}. The checkpoint is damaged: fetch {info.path} again."
    )
