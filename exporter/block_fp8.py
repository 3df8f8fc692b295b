"""Block quantisation to e4m3 (MODEL.md, FP8 checkpoints): the rule, in passes over arrays that the cache holds.

ml_dtypes' own conversion to e4m3 takes several times as long as all of this; a test compares both on every bf16 value.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from angelforge.exporter.quantization_errors import Errors

Array = npt.NDArray[Any]

FP8_MAX = np.float32(448)  # the largest e4m3 value
LEAST_AMAX = np.float32(1e-4)  # of a block, so that one of zeros has a scale

_CHUNK = 4096  # columns worked on at a time; with fewer, threads wait for Python's lock between the passes
_LEAST_NORMAL = np.float32(2.0**-6)  # below it the steps of e4m3 stay as wide as above it
_EXPONENT = np.int32(0x7F800000)  # of an f32's bits
_LARGEST_CODE = np.uint8(0x7E)


class NotFiniteError(ValueError):
    """A weight is NaN or infinite; `row` and `column` say where in what was to be quantised."""

    def __init__(self, row: int, column: int) -> None:
        super().__init__(row, column)
        self.row, self.column = row, column


class BlockQuantizer:
    """Quantises a row of blocks at a time, of any width. For one thread: its buffers (7 MB) serve every call."""

    def __init__(self, block: tuple[int, int] = (128, 128)) -> None:
        rows, self._columns = block
        self._chunk = max(1, _CHUNK // self._columns) * self._columns
        size = rows * self._chunk
        self._values, self._scaled, self._sums = (np.empty(size, np.float32) for _ in range(3))
        self._exponents, self._negative = np.empty(size, np.uint8), np.empty(size, np.bool_)
        self._least = np.full(self._chunk, _LEAST_NORMAL)  # an array: NumPy is slow at the maximum with a number

    def quantize(self, weights: Array, codes: Array) -> tuple[Array, Errors]:
        """Writes the e4m3 bits of `weights` (f32, f16 or bf16 [rows, width]) into `codes` (uint8, same shape).

        There are as many rows as a block has, or fewer. Returns the scales f32 [⌈width / block columns⌉] and what was
        lost. scale = max(amax of the block, 1e-4) / 448 and e4m3 = w / scale rounded to nearest even and cut at ±448,
        with IEEE divisions in f32. Raises NotFiniteError for NaN and infinity; `codes` may then be written in part.
        """
        scales, errors = [], Errors()
        for left in range(0, weights.shape[1], self._chunk):
            chunk = weights[:, left : left + self._chunk]
            try:
                found, lost = self._quantize(chunk, codes[:, left : left + self._chunk])
            except NotFiniteError as error:
                raise NotFiniteError(error.row, error.column + left) from None
            scales.append(found)
            errors += lost
        return np.concatenate(scales), errors

    def _quantize(self, weights: Array, codes: Array) -> tuple[Array, Errors]:
        values, scaled, sums, negative = (
            buffer[: weights.size].reshape(weights.shape)
            for buffer in (self._values, self._scaled, self._sums, self._negative)
        )
        np.copyto(values, weights)
        np.signbit(values, out=negative)
        np.absolute(values, out=scaled)
        starts = np.arange(0, weights.shape[1], self._columns)
        amax = np.maximum.reduceat(np.maximum.reduce(scaled, axis=0), starts)  # [blocks]; NaN stays NaN
        if not np.isfinite(amax).all():
            row, column = np.argwhere(~np.isfinite(values))[0]
            raise NotFiniteError(int(row), int(column))
        scales = np.maximum(amax, LEAST_AMAX) / FP8_MAX
        np.divide(scaled, np.repeat(scales, self._columns)[: weights.shape[1]], out=scaled)
        self._round(scaled, values, sums, codes)
        clipped, zeros = int(np.count_nonzero(codes > _LARGEST_CODE)), codes.size - int(np.count_nonzero(codes))
        signs = np.multiply(negative.view(np.uint8), np.uint8(128), out=negative.view(np.uint8))  # faster than shifting
        np.add(codes, signs, out=codes)
        return scales, _errors(scaled, sums, scales, starts, zeros, clipped)

    def _round(self, scaled: Array, power: Array, rounded: Array, codes: Array) -> None:
        """`scaled` ≥ 0 to e4m3: as bits in `codes`, as f32 in `rounded`; `power` is overwritten.

        To 2^e ≤ x < 2^(e+1) add 2^(e+20): f32 has 3 places after the leading one left for x, so the addition itself
        rounds to nearest even, and the lowest byte of the sum counts 8 to 16 eighths of 2^e. Below 2^-6 e stays -6.
        """
        exponents = self._exponents[: codes.size].reshape(codes.shape)
        np.maximum(scaled, self._least[: scaled.shape[1]], out=power)
        bits = power.view(np.int32)
        np.bitwise_and(bits, _EXPONENT, out=bits)
        np.add(bits, np.int32(20 << 23), out=bits)
        np.add(scaled, power, out=rounded)
        np.copyto(codes, rounded.view(np.int32), casting="unsafe")  # the lowest byte
        np.subtract(rounded, power, out=rounded)
        # e4m3 is 8 · (e + 6) + eighths; the bits of the power, cut to their exponent, are 8 · (e + 20 + 127).
        np.right_shift(bits, np.int32(20), out=bits)
        np.copyto(exponents, bits, casting="unsafe")
        np.add(codes, exponents, out=codes)
        np.subtract(codes, np.uint8(8 * (20 + 127 - 6) % 256), out=codes)


def _errors(scaled: Array, rounded: Array, scales: Array, starts: Array, zeros: int, clipped: int) -> Errors:
    """What rounding `scaled` [rows, width] to `rounded` lost; both are overwritten."""

    def squares(values: Array) -> Array:
        return np.multiply(values, values, out=values)

    def total(squared: Array) -> float:
        """Σ scale² · value²; row by row, so that the order of summation is the same everywhere."""
        columns = np.add.reduce(squared, axis=0).astype(np.float64)
        return float(np.add.reduce(np.add.reduceat(columns, starts) * scales.astype(np.float64) ** 2))

    lost = squares(np.subtract(scaled, rounded, out=rounded))
    weights = squares(scaled)
    largest = float(np.sqrt(np.maximum.reduce(np.maximum.reduce(lost, axis=0))))  # the root of a square is exact
    return Errors(scaled.size, zeros, clipped, total(weights), total(lost), largest)
