"""QKVPrepare's and QKVRotate's kernels in the interpreter against the bodies on ONNX Runtime."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.attention import BF16
from support.bodies import run_body
from support.interpreter import run_interpreted, to_numpy, to_torch

from angelforge.plugins.kernel import Kernel, Tile
from angelforge.plugins.qkv_prepare.kernel import KERNEL as PREPARE
from angelforge.plugins.qkv_rotate.kernel import KERNEL as ROTATE

EXAMPLES = settings(max_examples=max(10, settings().max_examples // 5))
TABLE_ROWS, PAGES = 40, 5


def inputs_of(kernel: Kernel, tokens: int, valid: int, sizes: tuple[int, ...], dtype: type, seed: int) -> list[Any]:
    """heads, kv_heads, head_dim, rotary_dim, page_size = sizes; every token has a slot of its own."""
    heads, kv_heads, head_dim, rotary_dim, page_size = sizes
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    norms = [(1 + 0.3 * normal(head_dim)).astype(dtype) for _ in range(2)] if kernel is PREPARE else []
    return [
        (3 * normal(tokens, (heads + 2 * kv_heads) * head_dim)).astype(dtype),
        *norms,
        normal(TABLE_ROWS, rotary_dim // 2),
        normal(TABLE_ROWS, rotary_dim // 2),
        rng.integers(0, TABLE_ROWS, tokens).astype(np.int32),
        rng.permutation(np.arange(page_size, PAGES * page_size))[:tokens].astype(np.int32),
        np.array([valid], np.int32),
        normal(PAGES, 2, kv_heads, page_size, head_dim).astype(dtype),
    ]


def _attributes(kernel: Kernel, sizes: tuple[int, ...]) -> dict[str, int | float]:
    epsilon = {"epsilon": 1e-5} if kernel is PREPARE else {}
    return {"num_heads": sizes[0], "num_kv_heads": sizes[1], "rotary_dim": sizes[3], **epsilon}


def _run(kernel: Kernel, inputs: list[Any], sizes: tuple[int, ...], tile: Tile | None = None) -> list[np.ndarray]:
    tensors = [to_torch(x) for x in inputs]
    return [to_numpy(x) for x in run_interpreted(kernel, tensors, _attributes(kernel, sizes), tile=tile)]


SIZES = st.sampled_from(
    [
        (4, 2, 32, 16, 16),
        (8, 1, 64, 64, 8),  # all dims rotated
        (3, 3, 32, 8, 24),  # heads and pages that are no power of two
        (4, 4, 128, 64, 16),
    ]
)
TILES = st.sampled_from([None, Tile(m=1, n=1, warps=1), Tile(m=1, n=8, warps=4)])


@EXAMPLES
@given(st.sampled_from([PREPARE, ROTATE]), st.integers(1, 6), st.integers(-1, 1), SIZES, TILES, st.integers(0, 100))
def test_kernel_and_body_agree(
    kernel: Kernel, tokens: int, padding: int, sizes: tuple[int, ...], tile: Tile | None, seed: int
) -> None:
    """Query and the whole pool; the last row of padding stands in slot 0, as in the body."""
    inputs = inputs_of(kernel, tokens, max(0, tokens - max(0, padding) * 2), sizes, np.float32, seed)
    expected = run_body(kernel.operator, inputs, _attributes(kernel, sizes))
    for found, wanted in zip(_run(kernel, inputs, sizes, tile), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("kernel", [PREPARE, ROTATE])
def test_bf16_is_rounded_once(kernel: Kernel) -> None:
    """f32 inside: all but few values are those of the body, none is further than one step."""
    sizes = (8, 2, 128, 64, 64)
    inputs = inputs_of(kernel, 4, 4, sizes, BF16, 1)
    expected = run_body(kernel.operator, inputs, _attributes(kernel, sizes))
    for found, wanted in zip(_run(kernel, inputs, sizes), expected, strict=True):
        found, wanted = found.astype(np.float32), wanted.astype(np.float32)
        assert (found == wanted).mean() > 0.998
        np.testing.assert_allclose(found, wanted, rtol=2**-7, atol=1e-6)


def test_only_the_slots_are_written() -> None:
    """Everything else in the pool keeps its bits; values pass as they are."""
    sizes = (4, 2, 32, 16, 16)
    inputs = inputs_of(PREPARE, 5, 5, sizes, np.float32, 2)
    before = inputs[-1].copy()
    _query, pool = _run(PREPARE, inputs, sizes)
    pages, offsets = np.divmod(inputs[6], 16)
    values = inputs[0].reshape(5, 8, 32)[:, 6:]
    np.testing.assert_array_equal(pool[pages, 1, :, offsets], values)
    pool[pages, :, :, offsets] = before[pages, :, :, offsets]
    np.testing.assert_array_equal(pool, before)


@pytest.mark.parametrize("kernel", [PREPARE, ROTATE])
def test_random_integers_are_safe(kernel: Kernel) -> None:
    """Any int32 in positions, slots and num_tokens: no stray access, and finite results."""
    sizes = (4, 2, 32, 16, 16)
    rng = np.random.default_rng(0)
    for bound in (2**31, 2**31, 100):
        inputs = inputs_of(kernel, 6, 6, sizes, np.float32, 3)
        for index in (-4, -3, -2):
            inputs[index] = rng.integers(-bound, bound, inputs[index].shape, dtype=np.int64).astype(np.int32)
        for result in _run(kernel, inputs, sizes):
            assert np.isfinite(result).all()


def test_extreme_rows_stay_finite() -> None:
    """A head of zeros, and one whose squares nearly overflow."""
    sizes = (4, 2, 32, 16, 16)
    inputs = inputs_of(PREPARE, 2, 2, sizes, np.float32, 4)
    inputs[0][0] = 0
    inputs[0][1] = 1e18
    for result in _run(PREPARE, inputs, sizes):
        assert np.isfinite(result).all()


@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(32, 24), (48, 16), (32, 0)])
def test_what_the_kernel_cannot_rotate_is_refused(head_dim: int, rotary_dim: int) -> None:
    sizes = (2, 1, head_dim, rotary_dim, 16)
    with pytest.raises(ValueError, match="powers of two"):
        _run(ROTATE, inputs_of(ROTATE, 1, 1, sizes, np.float32, 0), sizes)
