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


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("bound", [20, 200, 2**31])
def test_random_integers_are_safe(tile: Tile, bound: int) -> None:
    """Page tables, starts, lengths and positions of any int32: no stray access, every row finite after the merge."""
    rng = np.random.default_rng(bound)

    def integers(*shape: int) -> np.ndarray:
        return rng.integers(-bound // 4, bound, shape, dtype=np.int64).astype(np.int32)

    tokens, batch, width, pages = 12, 5, 6, 4
    inputs = [
        rng.standard_normal((tokens, 4, 32)).astype(np.float32),
        rng.standard_normal((pages, 2, 2, 16, 32)).astype(np.float32),
        integers(batch, width),
        integers(batch + 1),
        integers(batch),
        integers(tokens),
    ]
    tensors = [to_torch(array) for array in inputs]
    parts = run_interpreted(KERNEL, tensors, ATTRIBUTES, gpu=FEW_SMS, tile=tile)
    start = to_numpy(parts[3])
    assert ((start >= -1) & (start < len(parts[1]))).all()
    merging = Tile(m=1, n=128, k=4, stages=2)
    (attended,) = run_interpreted(
        MERGE, [*(part.nan_to_num() for part in parts[:3]), parts[3], *tensors[3:5]], {"split_length": 32}, tile=merging
    )
    assert np.isfinite(to_numpy(attended)).all()


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("start", [[5, 3, 9, 2], [-7, 2, 2, 40], [12, 12, 0, 0], [0, 0, 0, 0]])
def test_every_row_of_direct_is_written(tile: Tile, start: list[int]) -> None:
    """Starts that fall, begin late or end early: after the merge every row is finite, whoever it belongs to."""
    rng = np.random.default_rng(1)
    inputs = [
        rng.standard_normal((12, 4, 32)).astype(np.float32),
        rng.standard_normal((9, 2, 2, 16, 32)).astype(np.float32),
        rng.integers(0, 9, (3, 3)).astype(np.int32),
        np.array(start, np.int32),
        np.array([40, 17, 48], np.int32),
        rng.integers(0, 48, 12).astype(np.int32),
    ]
    tensors = [to_torch(array) for array in inputs]
    direct, partial, lse, first = run_interpreted(KERNEL, tensors, ATTRIBUTES, gpu=FEW_SMS, tile=tile)
    merging = Tile(m=1, n=128, k=4, stages=2)
    (attended,) = run_interpreted(
        MERGE, [direct, partial, lse, first, *tensors[3:5]], {"split_length": 32}, tile=merging
    )
    assert np.isfinite(to_numpy(attended)).all()
