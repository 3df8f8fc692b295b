"""The interpreter that kernels are tested in: its conversions round as a GPU does, and it sees every stray access."""

import ml_dtypes
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from support.interpreter import convert_float, exact_interpreter


def _exact(bits: np.ndarray, dtype: type) -> np.ndarray:
    return bits.view(dtype).astype(np.float64)


@pytest.mark.parametrize(
    ("target", "dtype", "bits"),
    [(tl.float8e4nv, ml_dtypes.float8_e4m3fn, np.uint8), (tl.bfloat16, ml_dtypes.bfloat16, np.uint16)],
)
def test_midpoints_round_to_even(target: tl.dtype, dtype: type, bits: type) -> None:
    """Every midpoint of neighbours goes to the even one, and the f32 values beside it to the nearer one."""
    largest = int(np.array(ml_dtypes.finfo(dtype).max, dtype).view(bits))
    low = np.arange(largest, dtype=bits)
    middle = ((_exact(low, dtype) + _exact(low + bits(1), dtype)) / 2).astype(np.float32)
    keep = middle != 0  # between the two smallest bf16 values f32 still has a midpoint; nothing is lost
    for sign in (1, -1):
        signed = (sign * middle).astype(np.float32)
        above = np.nextafter(signed, np.float32(sign * np.inf))
        below = np.nextafter(signed, np.float32(0))
        offset = bits(0 if sign == 1 else 1 << (8 * np.dtype(bits).itemsize - 1))
        for values, expected in ((signed, low + low % 2), (above, low + bits(1)), (below, low)):
            found = convert_float(values, tl.float32, target, None)
            np.testing.assert_array_equal(found[keep], (expected.astype(bits) | offset)[keep])


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16])
def test_widening_is_exact(dtype: type) -> None:
    """All values of a narrow type come through f32 unchanged, NaN included."""
    source = tl.float8e4nv if dtype is ml_dtypes.float8_e4m3fn else tl.bfloat16
    bits = np.arange(2 ** (8 * np.dtype(dtype).itemsize), dtype=f"u{np.dtype(dtype).itemsize}")
    wide = convert_float(bits, source, tl.float32, None).view(np.float32)
    np.testing.assert_array_equal(wide, bits.view(dtype).astype(np.float32))


def test_e4m3_saturates() -> None:
    """Beyond ±448 and at infinity the largest value, as `cvt.rn.satfinite` gives; NaN stays NaN."""
    values = np.array([448, 463.9, 464, 465, 1e30, np.inf, -449, -np.inf, np.nan], np.float32)
    found = convert_float(values, tl.float32, tl.float8e4nv, None).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(found, [448, 448, 448, 448, 448, 448, -448, -448, np.nan])


@triton.jit
def _copy(source, target, size: tl.constexpr, limit: tl.constexpr):
    index = tl.arange(0, size)
    tl.store(target + index, tl.load(source + index, mask=index < limit), mask=index < limit)


@triton.jit
def _multiply(a, b, c, size: tl.constexpr):
    index = tl.arange(0, size)[:, None] * size + tl.arange(0, size)[None, :]
    tl.store(c + index, tl.dot(tl.load(a + index), tl.load(b + index)))


def test_stray_accesses_are_seen() -> None:
    """One element past the end of a tensor, read or written, is an error; masked ones are not."""
    source, target = torch.arange(10.0), torch.zeros(10)
    with exact_interpreter([source], [target]):
        _copy[(1,)](source, target, 16, 10)
    assert torch.equal(source, target)
    longer = torch.zeros(16)
    for inputs, outputs, what in ((source, longer, "read"), (longer, target, "write")):
        with pytest.raises(Exception, match=f"{what} of 1 elements"), exact_interpreter([inputs], [outputs]):
            _copy[(1,)](inputs, outputs, 16, 11)
    with pytest.raises(Exception, match="write"), exact_interpreter([source, target], []):
        _copy[(1,)](source, target, 16, 10)  # inputs are not written
    with pytest.raises(Exception, match="does not need"), exact_interpreter([source], [target], unread=[source[9:]]):
        _copy[(1,)](source, target, 16, 10)
    with exact_interpreter([source], [target], unread=[source[9:]]):
        _copy[(1,)](source, target, 16, 9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float32])
def test_dot_widens_its_operands(dtype: torch.dtype) -> None:
    """A product of narrow matrices is the product of their values."""
    a, b = (torch.randn(16, 16, generator=torch.Generator().manual_seed(s)).to(dtype) for s in (0, 1))
    c = torch.empty(16, 16)
    with exact_interpreter([a, b], [c]):
        _multiply[(1,)](a, b, c, 16)
    torch.testing.assert_close(c, a.float() @ b.float())
