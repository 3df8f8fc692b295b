"""Block quantisation by its definition, in f64 and with a table of all e4m3 values: no bit tricks, nothing shared."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

E4M3 = ml_dtypes.float8_e4m3fn
LEVELS = np.arange(127, dtype=np.uint8).view(E4M3).astype(np.float64)  # 0 to 448, by code
_MIDDLES = (LEVELS[1:] + LEVELS[:-1]) / 2


def nearest_code(values: Array) -> Array:
    """The e4m3 bits nearest to f32 or f64 `values`, ties to the even code, cut at ±448, the sign of zero kept."""
    size = np.abs(values.astype(np.float64))
    below = np.searchsorted(_MIDDLES, size, side="left")  # a middle goes down …
    above = np.searchsorted(_MIDDLES, size, side="right")  # … or up
    return (np.where(below % 2 == 0, below, above) | (np.signbit(values) * 128)).astype(np.uint8)


def quantise_by_definition(weight: Array, block: tuple[int, int] = (128, 128)) -> tuple[Array, Array]:
    """(e4m3 bits uint8 [out, in], scales f32 [⌈out/128⌉, ⌈in/128⌉]), block by block."""
    wide = weight.astype(np.float32)
    rows, columns = (range(0, size, step) for size, step in zip(wide.shape, block, strict=True))
    codes, scales = np.empty(wide.shape, np.uint8), np.empty((len(rows), len(columns)), np.float32)
    for i, top in enumerate(rows):
        for j, left in enumerate(columns):
            place = (slice(top, top + block[0]), slice(left, left + block[1]))
            scales[i, j] = np.maximum(np.abs(wide[place]).max(), np.float32(1e-4)) / np.float32(448)
            codes[place] = nearest_code(wide[place] / scales[i, j])
    return codes, scales


def dequantised(codes: Array, scales: Array, block: tuple[int, int] = (128, 128)) -> Array:
    """e4m3 · scale in f64."""
    spread = np.repeat(np.repeat(scales.astype(np.float64), block[0], axis=0), block[1], axis=1)
    return np.asarray(codes.view(E4M3).astype(np.float64) * spread[: codes.shape[0], : codes.shape[1]])
