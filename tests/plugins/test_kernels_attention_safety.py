"""PagedAttention's kernel on integers that mean nothing, as TensorRT times it: safe, finite, and it ends."""

import numpy as np
import pytest
from support.attention import Shape
from support.interpreter import FEW_SMS, run_interpreted, to_numpy, to_torch

from angelforge.plugins.attention_merge.kernel import KERNEL as MERGE
from angelforge.plugins.kernel import Tile
from angelforge.plugins.paged_attention.kernel import KERNEL

SHAPE = Shape(heads=4, kv_heads=2)
ATTRIBUTES = {"scale": SHAPE.scale, "split_length": 32, "split_queries": 4}
TILES = [Tile(m=16, n=32, k=4, warps=4, stages=3), Tile(m=64, n=64, k=4, warps=4, stages=2)]
TOKENS, PAGES = 12, 9


def _attended(tile: Tile, table: np.ndarray, starts: np.ndarray, lengths: np.ndarray, places: np.ndarray) -> np.ndarray:
    """[T, Hq · D] of both kernels. Every access is checked, and whatever the first one wrote must be finite."""
    rng = np.random.default_rng(1)
    query = rng.standard_normal((TOKENS, 4, 32)).astype(np.float32)
    pool = rng.standard_normal((PAGES, 2, 2, 16, 32)).astype(np.float32)
    tensors = [to_torch(np.asarray(x)) for x in (query, pool, table, starts, lengths, places)]
    results = run_interpreted(KERNEL, tensors, ATTRIBUTES, gpu=FEW_SMS, tile=tile)
    *parts, first = (to_numpy(x) for x in results)
    assert ((first >= -1) & (first < len(parts[1]))).all()
    for index, part in enumerate(parts):
        unwritten = part.view(np.uint32) == 0xFFFFFFFF  # as run_interpreted fills it
        assert (np.isfinite(part) | unwritten | (np.isneginf(part) & (index == 2))).all()
        part[unwritten] = 0
    inputs = [*map(to_torch, parts), results[3], *tensors[3:5]]
    (attended,) = run_interpreted(MERGE, inputs, {"split_length": 32}, tile=Tile(m=1, n=128, k=4))
    return to_numpy(attended)


def _integers(bound: int, seed: int, *shape: int) -> np.ndarray:
    """Mostly positive, so that they mean something more often."""
    values = np.random.default_rng(seed).integers(-bound // 4, bound, shape, dtype=np.int64)
    return np.maximum(values, -(2**31)).astype(np.int32)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("bound", [20, 200, 2**31])
def test_random_integers_are_safe(tile: Tile, bound: int) -> None:
    """Page tables, starts, lengths and positions of any int32: no stray access, every row finite after the merge."""
    integers = [_integers(bound, seed, *shape) for seed, shape in enumerate([(5, 3), (6,), (5,), (TOKENS,)])]
    assert np.isfinite(_attended(tile, *integers)).all()


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("bound", [200, 2**31])
def test_lengths_and_pages_beyond_everything(tile: Tile, bound: int) -> None:
    """Sequences with rows, whose lengths pass their row of the page table and whose pages pass the pool."""
    starts = np.array([0, 1, 2, 12], np.int32)
    lengths = np.full(3, bound - 1, np.int32)
    result = _attended(tile, _integers(bound, 3, 3, 3), starts, lengths, _integers(bound, 4, TOKENS))
    assert np.isfinite(result).all()


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(
    ("starts", "first", "last"),
    [([9, 3, 12, 2], 9, 12), ([-7, 2, 2, 40], 0, 12), ([5, 0, 7, 6], 5, 7), ([0] * 4, 0, 0)],
)
def test_starts_that_do_not_rise(tile: Tile, starts: list[int], first: int, last: int) -> None:
    """They are made to rise: every row belongs to at most one sequence, and those of none give 0."""
    lengths = np.array([40, 17, 48], np.int32)
    table = np.random.default_rng(2).integers(0, PAGES, (3, 3)).astype(np.int32)
    result = _attended(tile, table, np.array(starts, np.int32), lengths, np.arange(TOKENS, dtype=np.int32))
    assert np.isfinite(result).all()
    assert (result[:first] == 0).all()
    assert (result[last:] == 0).all()
    assert (result[first:last] != 0).any(1).all()
