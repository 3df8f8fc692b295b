"""AttentionMerge and AttentionMergeQuantize: the body against NumPy, the kernels against the body."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.attention import BF16
from support.bodies import run_body
from support.interpreter import run_interpreted, to_numpy, to_torch

from angelforge.plugins.attention_merge.kernel import KERNEL as MERGE
from angelforge.plugins.attention_merge_quantize.kernel import KERNEL as QUANTIZE
from angelforge.plugins.kernel import Kernel, Tile

EXAMPLES = settings(max_examples=max(10, settings().max_examples // 5))
FEW = settings(max_examples=max(6, settings().max_examples // 5))
SPLIT = 8
ATTRIBUTES = {"split_length": SPLIT}
FP8 = ml_dtypes.float8_e4m3fn

# (tokens, keys, whether it is left in parts)
SEQUENCES = st.lists(
    st.tuples(st.integers(0, 3), st.sampled_from([1, 7, 8, 9, 30, 64]), st.booleans()), min_size=1, max_size=5
)


def parts(sequences: list[tuple[int, int, bool]], padding: int, heads: int, head_dim: int, seed: int) -> list[Any]:
    """The operators' inputs in f32; NaN in parts whose lse is −inf, and in rows that no sequence has."""
    rng = np.random.default_rng(seed)
    counts = [count for count, _, _ in sequences]
    starts, used = [], 2  # a gap before, between and behind the rows of sequences
    for count, length, in_parts in sequences:
        starts.append(used if in_parts and count else -1)
        used += (count * -(-length // SPLIT) + 1) * (in_parts and count > 0)
    lse = (rng.standard_normal((used, heads)) * 6).astype(np.float32)
    partial = rng.standard_normal((used, heads, head_dim)).astype(np.float32)
    own = np.zeros(used, bool)
    for (count, length, _), start in zip(sequences, starts, strict=True):
        if start < 0:
            continue
        for token in range(count):
            rows = start + token * -(-length // SPLIT) + np.arange(-(-length // SPLIT))
            own[rows] = True
            unseen = rng.random((len(rows), heads)) < 0.3
            unseen[rng.integers(len(rows)), :] = False
            lse[rows] = np.where(unseen, -np.inf, lse[rows])
    partial[~own], lse[~own] = np.nan, np.nan
    partial[np.isneginf(lse)] = np.nan
    lengths = [length if count else 0 for count, length, _ in sequences]
    return [
        rng.standard_normal((sum(counts) + padding, heads, head_dim)).astype(np.float32),
        partial,
        lse,
        np.array(starts, np.int32),
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        np.array(lengths, np.int32),
    ]


def merged(inputs: list[Any]) -> np.ndarray:
    """The operator's definition in float64, f32 [T, Hq·D]."""
    direct, partial, lse, starts, query_start, lengths = inputs
    result = direct.astype(np.float64)
    for sequence, start in enumerate(starts):
        count = -(-int(lengths[sequence]) // SPLIT)
        for token in range(query_start[sequence], query_start[sequence + 1]) if start >= 0 else ():
            rows = start + (token - query_start[sequence]) * count + np.arange(count)
            weights = np.exp(lse[rows].astype(np.float64) - lse[rows].max(0))
            weighted = np.where(weights[..., None] > 0, partial[rows] * weights[..., None], 0)
            result[token] = weighted.sum(0) / weights.sum(0)[:, None]
    return result.astype(np.float32).reshape(len(direct), -1)


def _run(kernel: Kernel, inputs: list[Any], tile: Tile) -> list[np.ndarray]:
    return [to_numpy(x) for x in run_interpreted(kernel, [to_torch(x) for x in inputs], ATTRIBUTES, tile=tile)]


@EXAMPLES
@given(SEQUENCES, st.integers(0, 2), st.integers(0, 100))
def test_the_body_joins_parts(sequences: list[tuple[int, int, bool]], padding: int, seed: int) -> None:
    """Σ softmax(lse) · partial for sequences in parts, a copy of direct for all other rows; NaN unseen stays unseen."""
    inputs = parts(sequences, padding, 3, 8, seed)
    if not len(inputs[0]):
        return
    (found,) = run_body(MERGE.operator, inputs, ATTRIBUTES)
    np.testing.assert_allclose(found, merged(inputs), rtol=1e-5, atol=2e-6)
    half = [inputs[0].astype(BF16), *inputs[1:]]
    expected = merged([half[0].astype(np.float32), *inputs[1:]]).astype(BF16)
    (found,) = run_body(MERGE.operator, half, ATTRIBUTES)
    np.testing.assert_allclose(found.astype(np.float32), expected.astype(np.float32), rtol=2**-8, atol=1e-6)


@EXAMPLES
@given(
    SEQUENCES,
    st.integers(0, 2),
    st.integers(0, 100),
    st.sampled_from([(1, 128), (4, 32), (5, 64)]),  # the last: a ragged group of 128 channels
    st.sampled_from([Tile(m=1, n=128, k=4, stages=3), Tile(m=1, n=256, k=2, stages=2)]),
)
def test_the_kernel_and_the_body_agree(
    sequences: list[tuple[int, int, bool]], padding: int, seed: int, sizes: tuple[int, int], tile: Tile
) -> None:
    """For sequences in parts, whole ones, empty ones and padding, whatever number of parts is loaded at once."""
    inputs = parts(sequences, padding, *sizes, seed)
    if not len(inputs[0]):
        return
    (expected,) = run_body(MERGE.operator, inputs, ATTRIBUTES)
    (found,) = _run(MERGE, inputs, tile)
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-6)


@FEW
@given(
    SEQUENCES,
    st.integers(0, 2),
    st.integers(0, 100),
    st.sampled_from([(2, 128), (5, 64), (3, 32)]),  # the second: a ragged group of 128 channels
    st.sampled_from([np.float32, BF16]),
)
def test_what_is_quantised(
    sequences: list[tuple[int, int, bool]], padding: int, seed: int, sizes: tuple[int, int], dtype: type
) -> None:
    """AttentionMerge's own value, rounded to direct's type, by 128 channels: max(amax, 1e-10)/448, RNE, to the bit."""
    heads, head_dim = sizes
    inputs = parts(sequences, padding, heads, head_dim, seed)
    if not len(inputs[0]):
        return
    inputs[0] = inputs[0].astype(dtype)
    inputs[0][-1] = 0  # a group of zeros, where the row is copied
    tile = Tile(m=1, n=128, k=8, stages=2)
    (joined,) = _run(MERGE, inputs, tile)
    width, groups = heads * head_dim, -(-heads * head_dim // 128)
    wide = np.zeros((len(joined), groups * 128), np.float32)
    wide[:, :width] = joined.astype(np.float32)
    wide = wide.reshape(len(joined), groups, 128)
    scale = np.maximum(np.abs(wide).max(2), np.float32(1e-10)) / np.float32(448)
    levels = np.clip(wide / scale[..., None], -448, 448).astype(FP8).reshape(len(joined), -1)[:, :width]
    found, found_scale = _run(QUANTIZE, inputs, tile)
    np.testing.assert_array_equal(found_scale, scale)
    np.testing.assert_array_equal(found.view(np.uint8), levels.view(np.uint8))
    body, body_scale = run_body(QUANTIZE.operator, inputs, ATTRIBUTES)
    np.testing.assert_allclose(found_scale, body_scale, rtol=2**-8 if dtype is BF16 else 1e-5)
    step = np.maximum(np.abs(body.astype(np.float32)) / 8, 2.0**-9)  # e4m3 has 3 bits behind the point
    assert (np.abs(found.astype(np.float32) - body.astype(np.float32)) <= step).all()


@pytest.mark.parametrize("kernel", [MERGE, QUANTIZE])
def test_random_integers_are_safe(kernel: Kernel) -> None:
    """Any int32 in starts and lengths: no stray access, and finite results for finite parts."""
    rng = np.random.default_rng(0)
    for seed in range(4):
        inputs = parts([(1, 30, True), (2, 9, True), (0, 1, True)], 1, 2, 64, seed)
        inputs[1:3] = [np.nan_to_num(x, neginf=-1e9) for x in inputs[1:3]]
        bound = (50, 2**31)[seed % 2]
        for index in (3, 4, 5):
            inputs[index] = rng.integers(-bound, bound, inputs[index].shape, dtype=np.int64).astype(np.int32)
        for result in _run(kernel, inputs, Tile(m=1, n=128, k=4, stages=2)):
            assert np.isfinite(result.astype(np.float32)).all()


def test_the_parts_of_the_longest_context_are_joined() -> None:
    """More than the 512 that 131,072 keys have, all with weight, beside a short sequence."""
    inputs = parts([(1, SPLIT * 520, True), (2, 30, True)], 1, 1, 128, 1)
    inputs[2] /= 6  # of like weight: none may be left out
    (found,) = _run(MERGE, inputs, Tile(m=1, n=128, k=4, stages=16))
    np.testing.assert_allclose(found, merged(inputs), rtol=3e-6, atol=2e-6)


def test_long_sequences_join_in_order() -> None:
    """Hundreds of parts, most of them without weight: no overflow and no loss."""
    inputs = parts([(1, 8 * 150, True)], 0, 1, 128, 1)
    seen = np.isfinite(inputs[2])
    inputs[2] = np.where(seen, np.linspace(-300, 200, len(seen))[:, None], inputs[2]).astype(np.float32)
    (found,) = _run(MERGE, inputs, Tile(m=1, n=128, k=4, stages=16))
    np.testing.assert_allclose(found, merged(inputs), rtol=3e-6, atol=1e-6)
