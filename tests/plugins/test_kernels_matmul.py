"""Dense matmuls: kernels in the interpreter against the function bodies, with quantised tensors as inputs.

A kernel may differ from its body by the order of sums: at most a few f32 roundings of the sum of magnitudes, then one
step of the output's type.
"""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.bodies import run_body
from support.interpreter import run_interpreted, to_numpy, to_torch

from angelforge.plugins.fp8_gate_up.kernel import KERNEL as FP8_GATE_UP
from angelforge.plugins.fp8_linear.kernel import KERNEL as FP8_LINEAR
from angelforge.plugins.gate_up.kernel import KERNEL as GATE_UP
from angelforge.plugins.kernel import Kernel, Tile
from angelforge.plugins.linear.kernel import KERNEL as LINEAR

BF16, FP8 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
MATMULS = [LINEAR, GATE_UP, FP8_LINEAR, FP8_GATE_UP]
PROFILES = (8, 64, 256, 8192)
F32_TYPE, BF16_TYPE = 1, 16
EXAMPLES = settings(max_examples=max(12, settings().max_examples // 3))
SUM_ERROR = 3e-6  # of the sum of magnitudes: some 2⁻²⁴ for each of a few hundred additions in random order


def blocks(size: int) -> int:
    """⌈size / 128⌉."""
    return -(-size // 128)


def make_inputs(kernel: Kernel, tokens: int, channels: int, depth: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Random inputs; FP8 values fill their range, scales spread over three orders of magnitude."""
    quantized = kernel.operator.name.startswith("Fp8")
    weights = 2 if "GateUp" in kernel.operator.name else 1

    def matrix(rows: int, blocks_of_rows: int, size: float) -> list[np.ndarray]:
        values = rng.standard_normal((rows, depth))
        if not quantized:
            return [(values * size).astype(BF16)]
        scale = size / 150 * 10 ** rng.uniform(-1.5, 0.5, (blocks_of_rows, blocks(depth)))
        return [np.clip(values * 150, -448, 448).astype(FP8), scale.astype(np.float32)]

    pairs = [matrix(tokens, tokens, 1.0), *(matrix(channels, blocks(channels), depth**-0.5) for _ in range(weights))]
    return [array for pair in pairs for array in pair]


def attributes_of(kernel: Kernel, dtype: int) -> dict[str, Any]:
    """The attribute `dtype` where there is one."""
    return {"dtype": dtype} if kernel.operator.attributes else {}


def run(kernel: Kernel, inputs: list[np.ndarray], attributes: dict[str, Any], **options: Any) -> list[np.ndarray]:
    """The kernel's outputs as arrays."""
    return [to_numpy(y) for y in run_interpreted(kernel, [to_torch(x) for x in inputs], attributes, **options)]


def magnitudes(kernel: Kernel, inputs: list[np.ndarray]) -> list[np.ndarray]:
    """For each weight Σ|x||w|, the scale of rounding errors of a sum."""
    if not kernel.operator.name.startswith("Fp8"):
        wide = [np.abs(x.astype(np.float64)) for x in inputs]
        return [wide[0] @ w.T for w in wide[1:]]
    depth = inputs[0].shape[1]

    def widened(values: np.ndarray, scale: np.ndarray, rows: int) -> np.ndarray:
        spread = np.repeat(np.repeat(scale, rows, 0), 128, 1)[: len(values), :depth]
        return np.abs(values.astype(np.float64)) * spread

    x = widened(inputs[0], inputs[1], 1)
    return [x @ widened(w, s, 128).T for w, s in zip(inputs[2::2], inputs[3::2], strict=True)]


def assert_linear(found: np.ndarray, body: np.ndarray, size: np.ndarray) -> None:
    """Equal up to the order of sums and one rounding of the output."""
    step = 2.0**-7 if found.dtype == BF16 else 2.0**-23
    limit = SUM_ERROR * size + step * np.abs(body.astype(np.float64))
    assert (np.abs(found.astype(np.float64) - body.astype(np.float64)) <= limit).all()


SHAPES = {
    "tokens": st.integers(1, 40) | st.sampled_from([1, 16, 17, 65, 130]),
    "channels": st.integers(1, 300) | st.sampled_from([64, 128, 192]),
    "depth": st.integers(1, 400) | st.sampled_from([64, 128, 256, 384]),
    "profile": st.sampled_from(PROFILES),
    "seed": st.integers(0, 2**32 - 1),
}


def ragged(**values: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Examples whose last block of channels is not full, in the tiles of decoding and of prompts."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        for channels in (130, 212, 300):
            for profile in (PROFILES[0], PROFILES[-1]):
                test = example(tokens=5, channels=channels, depth=140, profile=profile, seed=channels, **values)(test)
        return test

    return decorate


@EXAMPLES
@ragged(kernel=FP8_LINEAR, dtype=F32_TYPE)
@ragged(kernel=LINEAR, dtype=BF16_TYPE)
@given(kernel=st.sampled_from([LINEAR, FP8_LINEAR]), dtype=st.sampled_from([F32_TYPE, BF16_TYPE]), **SHAPES)
def test_linear_equals_its_body(
    kernel: Kernel, dtype: int, tokens: int, channels: int, depth: int, profile: int, seed: int
) -> None:
    """With every profile's tile, for sizes that are no multiples of anything."""
    inputs = make_inputs(kernel, tokens, channels, depth, np.random.default_rng(seed))
    found = run(kernel, inputs, attributes_of(kernel, dtype), profile_tokens=profile)
    body = run_body(kernel.operator, inputs, attributes_of(kernel, dtype))
    assert_linear(found[0], body[0], magnitudes(kernel, inputs)[0])


@EXAMPLES
@ragged()
@given(**SHAPES)
def test_gate_up_equals_its_body(tokens: int, channels: int, depth: int, profile: int, seed: int) -> None:
    """Within what the errors of both sums can change in silu(gate) · up, and one bf16 rounding."""
    inputs = make_inputs(GATE_UP, tokens, channels, depth, np.random.default_rng(seed))
    found = run(GATE_UP, inputs, {}, profile_tokens=profile)[0].astype(np.float64)
    body = run_body(GATE_UP.operator, inputs, {})[0].astype(np.float64)
    gate, up = magnitudes(GATE_UP, inputs)  # |silu(g)| ≤ |g|, |silu'| ≤ 1.1
    assert (np.abs(found - body) <= 3 * SUM_ERROR * gate * up + 2.0**-7 * np.abs(body)).all()


@EXAMPLES
@ragged()
@given(**SHAPES)
def test_fp8_gate_up_equals_its_body(tokens: int, channels: int, depth: int, profile: int, seed: int) -> None:
    """Scales to the last bits; a value next to a rounding boundary may fall on either side, others may not move."""
    inputs = make_inputs(FP8_GATE_UP, tokens, channels, depth, np.random.default_rng(seed))
    levels, scale = run(FP8_GATE_UP, inputs, {}, profile_tokens=profile)
    body_levels, body_scale = run_body(FP8_GATE_UP.operator, inputs, {})
    gate, up = magnitudes(FP8_GATE_UP, inputs)
    error = 3 * SUM_ERROR * gate * up  # [T, F], of the values before the quantisation
    worst = np.maximum.reduceat(error, np.arange(0, channels, 128), axis=1)  # [T, G]
    assert (np.abs(scale - body_scale) <= worst / 448 + 1e-6 * body_scale).all()
    found, body = levels.astype(np.float64), body_levels.astype(np.float64)
    wide = np.repeat(body_scale.astype(np.float64), 128, axis=1)[:, :channels]
    step = np.maximum(np.abs(body) / 8, 2.0**-9)  # the widest gap of e4m3 beside a value
    moved = (
        error / wide
        + 1e-5 * np.abs(body)
        + np.repeat(worst / body_scale / 448, 128, axis=1)[:, :channels] * np.abs(body)
    )
    assert (np.abs(found - body) <= step + moved).all()
    assert (found != body).mean() <= 0.01 + 4 * (moved / step).mean()


@pytest.mark.parametrize("kernel", MATMULS, ids=lambda kernel: kernel.operator.name)
def test_rows_do_not_depend_on_the_batch(kernel: Kernel) -> None:
    """Bit for bit: one token alone, among others, and in every profile's tile (products added in the order of K)."""
    inputs = make_inputs(kernel, 67, 130, 328, np.random.default_rng(5))
    attributes = attributes_of(kernel, F32_TYPE)
    rows = 2 if kernel.operator.name.startswith("Fp8") else 1  # inputs that have a row for each token
    alone = [x[66:] if i < rows else x for i, x in enumerate(inputs)]
    first = run(kernel, alone, attributes, profile_tokens=8, ordered=True)
    for profile in PROFILES:
        batch = run(kernel, inputs, attributes, profile_tokens=profile, ordered=True)
        for one, many in zip(first, batch, strict=True):
            np.testing.assert_array_equal(one[0].view(np.uint8), many[66].view(np.uint8))


@pytest.mark.parametrize("kernel", MATMULS, ids=lambda kernel: kernel.operator.name)
@pytest.mark.parametrize("size", [0.0, 448.0])
def test_extreme_inputs_give_finite_outputs(kernel: Kernel, size: float) -> None:
    """Zeros give zeros; the largest values saturate in FP8 and stay finite elsewhere, as in the body."""
    inputs = make_inputs(kernel, 3, 130, 200, np.random.default_rng(0))
    inputs = [np.full(x.shape, size).astype(x.dtype) if x.dtype != np.float32 else x for x in inputs]
    found = run(kernel, inputs, attributes_of(kernel, BF16_TYPE))
    for y, body in zip(found, run_body(kernel.operator, inputs, attributes_of(kernel, BF16_TYPE)), strict=True):
        assert np.isfinite(y.astype(np.float32)).all()
        np.testing.assert_allclose(y.astype(np.float32), body.astype(np.float32), rtol=1e-2)


@pytest.mark.parametrize(
    ("kernel", "tokens"), [(LINEAR, 8197), (FP8_LINEAR, 1100), (GATE_UP, 1100), (FP8_GATE_UP, 1100)]
)
def test_every_tile_of_a_long_prefill_is_computed(kernel: Kernel, tokens: int) -> None:
    """More row tiles than one group has, the last group and the last tile not full: every element is right."""
    inputs = make_inputs(kernel, tokens, 130 if tokens < 8192 else 8, 16, np.random.default_rng(2))
    found = run(kernel, inputs, attributes_of(kernel, F32_TYPE))[0].astype(np.float64)
    body = run_body(kernel.operator, inputs, attributes_of(kernel, F32_TYPE))[0].astype(np.float64)
    np.testing.assert_allclose(found, body, rtol=0.125, atol=np.abs(body).max() * 1e-3)


@pytest.mark.parametrize("kernel", MATMULS, ids=lambda kernel: kernel.operator.name)
def test_no_rows_give_no_rows(kernel: Kernel) -> None:
    """A call in which no row needs logits launches nothing."""
    inputs = make_inputs(kernel, 0, 70, 130, np.random.default_rng(0))
    found = run(kernel, inputs, attributes_of(kernel, F32_TYPE))
    assert found[0].shape == (0, 70)


@pytest.mark.parametrize("kernel", [LINEAR, GATE_UP], ids=lambda kernel: kernel.operator.name)
def test_f32_is_refused(kernel: Kernel) -> None:
    """f32 bundles never reach a GPU: the message says so instead of a slow or inexact product."""
    inputs = [x.astype(np.float32) for x in make_inputs(kernel, 2, 8, 16, np.random.default_rng(0))]
    with pytest.raises(ValueError, match="f32 bundles run on the CPU target"):
        run(kernel, inputs, attributes_of(kernel, F32_TYPE))


@pytest.mark.parametrize(
    ("kernel", "tile"),
    [
        (FP8_LINEAR, Tile(m=128, n=256)),  # two blocks of weight scales
        (FP8_LINEAR, Tile(m=128, n=128, k=256)),
        (FP8_LINEAR, Tile(m=16, n=32)),  # no wgmma: FP8 would become f16
        (FP8_GATE_UP, Tile(m=16, n=64, k=64)),  # half a group to quantise
        (LINEAR, Tile(m=8, n=64, k=64)),
        (GATE_UP, Tile(m=16, n=64, k=16)),
    ],
)
def test_tiles_that_would_be_wrong_are_refused(kernel: Kernel, tile: Tile) -> None:
    """Whoever tunes gets a ValueError instead of a wrong result or slow instructions."""
    inputs = make_inputs(kernel, 2, 256, 256, np.random.default_rng(0))
    with pytest.raises(ValueError, match="tile"):
        run(kernel, inputs, attributes_of(kernel, F32_TYPE), tile=tile)
