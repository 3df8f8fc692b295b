"""The fast quantiser is the plain definition to the last bit, and tells truly what was lost."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fp8 import E4M3, LEVELS, dequantised, nearest_code, quantise_by_definition

from angelforge.exporter import block_fp8
from angelforge.exporter.block_fp8 import BlockQuantizer, NotFiniteError

BF16 = ml_dtypes.bfloat16
ALL_BF16 = np.arange(65536, dtype=np.uint16).view(BF16)
ONE_BLOCK = (512, 128)  # holds all of them


def quantise(weights, block=(128, 128)):
    """The rows of blocks one after another: codes, scales, errors."""
    quantizer = BlockQuantizer(block)
    codes, scales, errors = np.empty(weights.shape, np.uint8), [], []
    for top in range(0, len(weights), block[0]):
        found, lost = quantizer.quantize(weights[top : top + block[0]], codes[top : top + block[0]])
        scales.append(found)
        errors.append(lost)
    return codes, np.stack(scales), errors


def assert_by_definition(weights, block=(128, 128)):
    codes, scales, _ = quantise(weights, block)
    wanted_codes, wanted_scales = quantise_by_definition(weights, block)
    np.testing.assert_array_equal(scales, wanted_scales)
    np.testing.assert_array_equal(codes, wanted_codes)


def test_the_definition_rounds_as_ml_dtypes_does():
    """Every level, every middle and its neighbours, both signs; ml_dtypes does not saturate."""
    middles = ((LEVELS[1:] + LEVELS[:-1]) / 2).astype(np.float32)
    values = np.concatenate([LEVELS, middles, np.nextafter(middles, 0), np.nextafter(middles, 999)]).astype(np.float32)
    values = np.concatenate([values, -values])
    np.testing.assert_array_equal(nearest_code(values), values.astype(E4M3).view(np.uint8))
    np.testing.assert_array_equal(nearest_code(np.array([464.1, 1e9, -465])), [0x7E, 0x7E, 0xFE])


@given(st.integers(0, 0x7F7F))
def test_all_bf16_values_at_any_scale(largest):
    """All 65,536 in one block, those larger than `largest` replaced: every pair of a weight and a scale may come."""
    amax = np.uint16(largest).view(BF16)
    with np.errstate(invalid="ignore"):
        weights = np.where(np.abs(ALL_BF16) <= amax, ALL_BF16, amax)
    assert_by_definition(weights.reshape(ONE_BLOCK), ONE_BLOCK)


@given(st.integers(-100, 100), st.integers(0, 2**32 - 1))
def test_ties_go_to_the_even_code(exponent, seed):
    """f32 weights on and around every middle of two levels, with a scale that is a power of two."""
    scale = 2.0**exponent
    middles = ((LEVELS[1:] + LEVELS[:-1]) / 2 * scale).astype(np.float32)
    values = np.concatenate([middles, np.nextafter(middles, np.float32(0)), np.nextafter(middles, np.float32(np.inf))])
    weights = np.random.default_rng(seed).permutation(np.concatenate([values, -values, [np.float32(448 * scale)]]))
    block = (1, len(weights))
    if 448 * scale > 1e-4:
        assert quantise(weights[None], block)[1] == np.float32(scale)
    assert_by_definition(weights[None], block)


@given(
    st.integers(1, 300),
    st.integers(1, 2500),
    st.sampled_from([np.float32, np.float16, BF16]),
    st.sampled_from([(128, 128), (32, 64), (3, 5000)]),
    st.integers(0, 2**32 - 1),
)
def test_any_size_type_and_block(rows, columns, dtype, block, seed):
    """Ragged edges included: a block at an edge is scaled by the weights that it has."""
    random = np.random.default_rng(seed)
    spread = 2.0 ** random.integers(-14, 2, (-(-rows // 50), columns)).repeat(50, axis=0)[:rows]
    weights = (random.standard_normal((rows, columns)) * spread).astype(dtype)
    assert_by_definition(weights, block)


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-30, 1e-4, 3e38])
def test_blocks_of_one_value(value):
    """Zeros keep their sign and have the least scale; a block of equal weights loses what its scale rounds off."""
    weights = np.full((128, 256), value, np.float32)
    codes, scales, errors = quantise(weights)
    assert_by_definition(weights)
    assert (scales == np.maximum(np.float32(value), np.float32(1e-4)) / np.float32(448)).all()
    assert (codes == (0x80 if np.signbit(value) else 0) if abs(value) < 1e-10 else codes == 0x7E).all()
    assert errors[0].zeros == (weights.size if abs(value) < 1e-10 else 0)


def test_a_view_of_columns_is_quantised_like_a_copy():
    """As slices of shared experts are."""
    weights = np.random.default_rng(0).standard_normal((128, 3000)).astype(BF16)
    part, codes = weights[:, 700:2100], np.empty((128, 1400), np.uint8)
    scales, _ = BlockQuantizer().quantize(part, codes)
    wanted = quantise(part.copy())
    np.testing.assert_array_equal(codes, wanted[0])
    np.testing.assert_array_equal(scales, wanted[1][0])


def test_chunks_change_neither_codes_nor_errors(monkeypatch):
    weights = np.random.default_rng(1).standard_normal((100, 1000)).astype(BF16)
    whole = quantise(weights)
    monkeypatch.setattr(block_fp8, "_CHUNK", 1)  # then a block at a time
    parts = quantise(weights)
    np.testing.assert_array_equal(whole[0], parts[0])
    np.testing.assert_array_equal(whole[1], parts[1])
    assert parts[2][0].error_squares == pytest.approx(whole[2][0].error_squares, rel=1e-14)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [(0, 0), (77, 1023), (127, 1024), (3, 2099)])
def test_what_is_not_finite_is_found(dtype, value, place):
    weights = np.ones((128, 2100), dtype)
    weights[place] = value
    with pytest.raises(NotFiniteError) as caught:
        quantise(weights)
    assert (caught.value.row, caught.value.column) == place


@given(st.integers(1, 130), st.integers(1, 700), st.integers(0, 2**32 - 1))
def test_errors_are_those_of_the_definition(rows, columns, seed):
    """Counts and the largest exactly, sums to what adding up f32 allows."""
    random = np.random.default_rng(seed)
    weights = (random.standard_normal((rows, columns)) * 2.0 ** random.integers(-20, 0, (1, columns))).astype(BF16)
    codes, scales, parts = quantise(weights)
    errors = sum(parts[1:], parts[0])
    exact = weights.astype(np.float64)
    lost = exact - dequantised(codes, scales)
    spread = np.repeat(np.repeat(scales, 128, axis=0), 128, axis=1)[:rows, :columns]
    assert (errors.count, errors.zeros, errors.clipped) == (exact.size, int((codes & 0x7F == 0).sum()), 0)
    assert errors.weight_squares == pytest.approx((exact**2).sum(), rel=1e-5)
    # Quotients are rounded to f32 before they are rounded to e4m3.
    assert errors.error_squares == pytest.approx((lost**2).sum(), rel=1e-3, abs=1e-12 * (exact**2).sum())
    assert errors.largest == pytest.approx(np.abs(lost / spread).max(), rel=1e-3, abs=1e-4)
    assert errors.relative == pytest.approx(np.sqrt((lost**2).sum() / (exact**2).sum()), rel=1e-3, abs=1e-6)
