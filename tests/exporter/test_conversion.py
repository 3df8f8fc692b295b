"""Conversions round once, to nearest even, and say where a value does not fit."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support.bundles import rounded

from angelforge.dtypes import DType
from angelforge.exporter.conversion import convert, convertible, dequantize, first_overflow, products, quantizable

CODES = np.array([c for c in range(256) if c & 0x7F != 0x7F], np.uint8)  # all but the two NaN
# Large enough that every bf16 result is normal, as the oracle assumes.
scales = st.floats(2.0**-100, 2.0**100, width=32)


@pytest.mark.parametrize("source", [DType.BF16, DType.F16])
def test_widening_keeps_every_one_of_the_65536_values(source):
    values = np.arange(65536, dtype=np.uint16).view(source.numpy)
    widened = convert(values, DType.F32)
    assert widened.dtype == np.float32
    with np.errstate(invalid="ignore"):  # signalling NaN
        assert np.array_equal(widened.astype(np.float64), values.astype(np.float64), equal_nan=True)


@pytest.mark.parametrize("source", [np.float32, np.float16])
def test_bf16_is_rounded_to_nearest_even(source):
    """Around every midpoint of two bf16 of one binade, and on it."""
    middle = np.arange(128, 256, 0.5).astype(np.float32)
    values = np.concatenate([middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(999))])
    values = np.concatenate([values, -values]).astype(source)
    assert np.array_equal(convert(values, DType.BF16), rounded(values.astype(np.float64), DType.BF16.numpy))


@given(hnp.arrays(np.float32, 16, elements=st.floats(2.0**-120, 2.0**120, width=32)))
def test_any_f32_is_rounded_to_nearest_even(values):
    assert np.array_equal(convert(values, DType.BF16), rounded(values.astype(np.float64), DType.BF16.numpy))


def exact_products(scale):
    """All e4m3 values times an f32 scale, in f64, which holds them exactly."""
    return CODES.view(ml_dtypes.float8_e4m3fn).astype(np.float64) * np.float64(scale)


@given(scales)
@pytest.mark.parametrize("target", [DType.F32, DType.BF16])
def test_every_code_times_a_scale_is_rounded_once(target, scale):
    found = products(np.float32([scale]), target)[0, CODES]
    assert np.array_equal(found, rounded(exact_products(scale), target.numpy))


@given(st.integers(128, 255), st.integers(-60, 60), st.sampled_from([c for c in CODES if c & 0x7F]))
def test_two_roundings_are_never_seen(mantissa, exponent, code):
    """Scales chosen so that a product lies within an f32 rounding of a midpoint of two bf16."""
    value = abs(float(np.uint8(code).view(ml_dtypes.float8_e4m3fn)))
    middle = np.float32((mantissa + 0.5) * 2.0**exponent / value)
    for scale in (np.nextafter(middle, np.float32(0)), middle, np.nextafter(middle, np.float32(np.inf))):
        found = products(np.float32([scale]), DType.BF16)[0, CODES]
        assert np.array_equal(found, rounded(exact_products(scale), DType.BF16.numpy))


@pytest.mark.parametrize("target", [DType.F32, DType.BF16])
def test_each_element_takes_the_scale_of_its_block(target):
    """Blocks begin anywhere in the rectangle and differ in size."""
    random = np.random.default_rng(0)
    codes = CODES[random.integers(0, len(CODES), (5, 7))]
    blocks = random.random((2, 3)).astype(np.float32)
    rows, columns = np.array([0, 1, 1, 1, 1]), np.array([0, 0, 1, 1, 1, 1, 2])
    exact = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64) * blocks[rows[:, None], columns]
    found = dequantize(codes, blocks, rows, columns, target)
    assert np.array_equal(found, rounded(exact, target.numpy))


def test_nan_codes_stay_nan():
    assert np.isnan(products(np.float32([2.0]), DType.BF16)[0, [0x7F, 0xFF]].astype(np.float32)).all()


def test_the_first_created_infinity_is_found():
    """What was not finite before is not counted."""
    before = np.array([np.inf, np.nan, 1, 3.4e38, 3.4e38], np.float32)
    assert first_overflow(before, convert(before, DType.BF16)) == 3
    assert first_overflow(before[:3], convert(before[:3], DType.BF16)) is None
    huge = products(np.float32([1.0, 1e38]), DType.F32)[:, 0x7E]
    assert first_overflow(np.array([448.0, 448.0]), huge) == 1


def test_the_largest_finite_values_fit():
    largest = np.array([ml_dtypes.finfo(ml_dtypes.bfloat16).max, 65504], np.float32)
    assert first_overflow(largest, convert(largest, DType.BF16)) is None


def test_what_can_be_converted():
    """Floats to f32 and bf16, FP8 to those too; quantised are floats only, and integers are left alone."""
    into = {target: {s for s in DType if convertible(s, target)} for target in (DType.F32, DType.BF16, DType.F8_E4M3)}
    floats = {DType.F32, DType.F16, DType.BF16, DType.F8_E4M3}
    assert {source for source in DType if quantizable(source)} == floats - {DType.F8_E4M3}
    assert into == {DType.F32: floats, DType.BF16: floats, DType.F8_E4M3: {DType.F8_E4M3}}
