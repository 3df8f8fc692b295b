"""Embedding and the norms: kernels in the interpreter against the function bodies, and the FP8 rounding itself.

bf16 bodies run in onnx's evaluator, since ONNX Runtime has no bf16 arithmetic; there kernel and body agree but for sums
in another order, which move a bf16 value by at most its last bit. What is quantised is judged from the kernel's own
normalised row: from there on every bit is fixed.
"""

import tempfile
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from support.bodies import run_body, run_reference
from support.interpreter import exact_interpreter, run_interpreted, to_numpy, to_torch

from angelforge.plugins.add_norm.kernel import KERNEL as ADD_NORM
from angelforge.plugins.add_norm_quantize.kernel import KERNEL as ADD_NORM_QUANTIZE
from angelforge.plugins.device.numbers import group_scale, quantize
from angelforge.plugins.embedding.kernel import KERNEL as EMBEDDING
from angelforge.plugins.kernel import Kernel, Tile
from angelforge.plugins.norm.kernel import KERNEL as NORM
from angelforge.plugins.norm_quantize.kernel import KERNEL as NORM_QUANTIZE

BF16, FP8 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
NORMS = [NORM, NORM_QUANTIZE, ADD_NORM, ADD_NORM_QUANTIZE]
EPSILON = {"epsilon": 1e-6}


def _run(kernel: Kernel, inputs: list[np.ndarray], attributes: dict[str, Any]) -> list[np.ndarray]:
    return [to_numpy(y) for y in run_interpreted(kernel, [to_torch(x) for x in inputs], attributes)]


def quantized(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """DESIGN.md's rule in NumPy: f32 [T, H] → e4m3 [T, H], f32 [T, ⌈H/128⌉]."""
    groups = -(-x.shape[1] // 128)
    wide = np.zeros((len(x), groups * 128), np.float32)
    wide[:, : x.shape[1]] = x
    wide = wide.reshape(len(x), groups, 128)
    scale = np.maximum(np.abs(wide).max(2), np.float32(1e-10)) / np.float32(448)
    levels = np.clip(wide / scale[..., None], -448, 448).astype(FP8)
    return levels.reshape(len(x), -1)[:, : x.shape[1]], scale


def _norm_inputs(kernel: Kernel, rows: np.ndarray, dtype: Any, rng: np.random.Generator) -> list[np.ndarray]:
    weight = (1 + 0.2 * rng.standard_normal(rows.shape[1])).astype(dtype)
    added = [rng.standard_normal(rows.shape).astype(dtype)] if len(kernel.operator.inputs) == 3 else []
    return [rows.astype(dtype), *added, weight]


def _bf16_steps(a: np.ndarray, b: np.ndarray) -> int:
    """Most representable values between two bf16 arrays' elements."""

    def ordinal(x: np.ndarray) -> np.ndarray:
        bits = x.view(np.int16).astype(np.int32)
        return np.where(bits < 0, -(bits & 0x7FFF), bits)

    return int(np.abs(ordinal(a) - ordinal(b)).max())


@given(
    kernel=st.sampled_from(NORMS),
    dtype=st.sampled_from([np.float32, BF16]),
    tokens=st.integers(1, 5),
    width=st.integers(1, 400) | st.sampled_from([128, 256, 1024]),
    spread=st.sampled_from([0.0, 1.0, 8.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_norms_equal_their_bodies(
    kernel: Kernel, dtype: Any, tokens: int, width: int, spread: float, seed: int
) -> None:
    """Residual exact; normed to 1e-6 in f32 or one bf16 step; quantised values and scales exact for that normed row."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((tokens, width)) * np.exp(spread * rng.standard_normal((tokens, 1)))
    inputs = _norm_inputs(kernel, rows, dtype, rng)
    found = _run(kernel, inputs, EPSILON)
    expected = (run_reference if dtype is BF16 else run_body)(kernel.operator, inputs, EPSILON)
    named = dict(zip([port.name for port in kernel.operator.outputs], zip(found, expected, strict=True), strict=True))
    if "residual_out" in named:
        np.testing.assert_array_equal(*named["residual_out"])
    normed, truth = named["normed"]
    if dtype is BF16:
        assert _bf16_steps(normed, truth) <= 1
    else:
        np.testing.assert_allclose(normed, truth, rtol=1e-6, atol=1e-9)
    if "quantized" in named:
        levels, scale = quantized(normed.astype(np.float32))
        np.testing.assert_array_equal(named["scale"][0], scale)
        np.testing.assert_array_equal(named["quantized"][0].view(np.uint8), levels.view(np.uint8))
        np.testing.assert_allclose(*named["scale"], rtol=2.0**-7)


@pytest.mark.parametrize("kernel", NORMS, ids=lambda kernel: kernel.operator.name)
@pytest.mark.parametrize("value", [0.0, 1e-30, 3e38, -3e38])
def test_norms_of_extreme_rows_are_finite(kernel: Kernel, value: float) -> None:
    """A row of zeros is zeros; values whose squares overflow or vanish give finite results, as in the body."""
    rng = np.random.default_rng(0)
    inputs = _norm_inputs(kernel, np.full((2, 130), value), BF16, rng)
    if len(inputs) == 3:
        inputs[1] = np.zeros_like(inputs[1])
    found = _run(kernel, inputs, EPSILON)
    for y, truth in zip(found, run_reference(kernel.operator, inputs, EPSILON), strict=True):
        assert np.isfinite(y.astype(np.float32)).all()
        np.testing.assert_array_equal(y, truth)


@pytest.mark.parametrize("tile", [Tile(m=1, n=256), Tile(m=1, n=65536)])
def test_a_row_that_does_not_fit_is_refused(tile: Tile) -> None:
    """A tile shorter than the row, and one that no block's registers hold."""
    inputs = _norm_inputs(NORM, np.ones((1, 300)), BF16, np.random.default_rng(0))
    with pytest.raises(ValueError, match="a row of 300 channels"):
        run_interpreted(NORM, [to_torch(x) for x in inputs], EPSILON, tile=tile)


@triton.jit
def _quantize(x, levels, scales, size: tl.constexpr):
    index = tl.arange(0, size)[:, None] * 128 + tl.arange(0, 128)[None, :]
    value = tl.load(x + index)
    scale = group_scale(tl.max(tl.abs(value), 1))
    tl.store(scales + tl.arange(0, size), scale)
    tl.store(levels + index, quantize(value, scale[:, None]))


def test_quantisation_rounds_every_midpoint_to_even() -> None:
    """At scale 1 all midpoints of e4m3 and their neighbours, at other scales random values and the extremes."""
    exact = np.arange(127, dtype=np.uint8).view(FP8).astype(np.float32)
    middle = (exact[1:] + exact[:-1]) / 2
    rows = [np.full(128, 448, np.float32) for _ in range(3)]
    for row, values in zip(
        rows, (middle, np.nextafter(middle, np.float32(500)), np.nextafter(middle, -1)), strict=True
    ):
        row[: len(values)] = values
    rng = np.random.default_rng(1)
    rows += [np.zeros(128), np.full(128, 1e-38), np.full(128, -3e38), *rng.standard_normal((10, 128)) * 100]
    x = np.array(rows, np.float32)
    levels, scales = torch.empty(16, 128, dtype=torch.float8_e4m3fn), torch.empty(16)
    with exact_interpreter([source := to_torch(x)], [levels, scales]):
        _quantize[(1,)](source, levels, scales, 16)
    expected, expected_scales = quantized(x)
    np.testing.assert_array_equal(to_numpy(scales), expected_scales[:, 0])
    np.testing.assert_array_equal(to_numpy(levels).view(np.uint8), expected.view(np.uint8))
    assert (to_numpy(levels)[0, :126].view(np.uint8) % 2 == 0).all()


def test_what_is_no_number_stays_none() -> None:
    """A NaN is not made the largest value, after which nothing would show that something broke."""
    x = np.ones((2, 128), np.float32)
    x[0, 5] = np.nan
    levels, scales = torch.empty(2, 128, dtype=torch.float8_e4m3fn), torch.empty(2)
    with exact_interpreter([source := to_torch(x)], [levels, scales]):
        _quantize[(1,)](source, levels, scales, 2)
    found = to_numpy(levels).astype(np.float32)
    assert np.isnan(found[0, 5])
    assert (found[1] == 448).all()


@given(
    ids=st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-2, 12), min_size=1, max_size=6),
    vocabulary=st.integers(1, 11),
    width=st.integers(1, 300),
    dtype=st.sampled_from([np.float32, BF16]),
    target=st.sampled_from([1, 16]),
    seed=st.integers(0, 2**32 - 1),
)
def test_embedding_equals_its_body(
    ids: list[int], vocabulary: int, width: int, dtype: Any, target: int, seed: int
) -> None:
    """Bit for bit, for any int64 as id; ids outside the table give zeros and read nothing.

    ONNX Runtime selects no bf16 values on a CPU: those are judged by onnx's evaluator.
    """
    table = np.random.default_rng(seed).standard_normal((vocabulary, width)).astype(dtype)
    inputs = [np.array(ids, np.int64), table]
    found = _run(EMBEDDING, inputs, {"dtype": target})
    body = run_body if target == 1 else run_reference
    np.testing.assert_array_equal(found[0], body(EMBEDDING.operator, inputs, {"dtype": target})[0])


def test_embedding_reaches_rows_beyond_2_to_the_31() -> None:
    """Offsets are 64 bits wide: a row after 2³¹ elements of a (sparse) table."""
    rows, width = 2**18 + 3, 8192
    with tempfile.NamedTemporaryFile() as file:
        table = torch.from_file(file.name, shared=True, size=rows * width, dtype=torch.bfloat16).view(rows, width)
        table[rows - 1] = 1.5
        found = run_interpreted(EMBEDDING, [torch.tensor([rows - 1, rows - 2]), table], {"dtype": 16})
    assert (found[0][0] == 1.5).all()
    assert (found[0][1] == 0).all()
