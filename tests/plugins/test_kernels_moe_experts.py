"""The experts' grouped matmuls: kernels in the interpreter against the function bodies, quantised tensors as inputs."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.bodies import run_body
from support.expert_inputs import BF16, Sizes, assert_close, attributes_of, is_fp8, make_inputs
from support.interpreter import run_interpreted, to_numpy, to_torch
from support.routing import choose, expert_tokens

from angelforge.plugins.fp8_moe_down.kernel import KERNEL as FP8_DOWN
from angelforge.plugins.fp8_moe_gate_up.kernel import KERNEL as FP8_GATE_UP
from angelforge.plugins.kernel import Gpu, Kernel, Tile
from angelforge.plugins.moe_down.kernel import KERNEL as DOWN
from angelforge.plugins.moe_gate_up.kernel import KERNEL as GATE_UP

KERNELS = [GATE_UP, DOWN, FP8_GATE_UP, FP8_DOWN]
DECODE, PREFILL = 8, 8192  # most tokens of the profiles that have a tile of their own
SMALL = Gpu("sm_90", 1)  # a few programs share the work, each takes several turns
EXAMPLES = settings(max_examples=max(8, settings().max_examples // 6))
each_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.operator.name)


def run(
    kernel: Kernel, inputs: list[np.ndarray], profile: int = DECODE, unread_from: tuple[int, ...] = (), **options
) -> list[np.ndarray]:
    """The kernel's outputs as arrays; those in the activation type are bf16.

    Rows of the floating-point inputs from `unread_from` on, by input, may not even be read.
    """
    tensors = [to_torch(x) for x in inputs]
    options["unread"] = [tensor[first:] for tensor, first in zip(tensors, unread_from, strict=False)]
    outputs = run_interpreted(kernel, tensors, attributes_of(kernel), gpu=SMALL, profile_tokens=profile, **options)
    return [to_numpy(y) for y in outputs]


def check(kernel: Kernel, sizes: Sizes, ids: np.ndarray, profile: int, seed: int = 0) -> None:
    """The kernel and its body agree on a choice of experts; every element of the outputs is written."""
    bits = expert_tokens(ids, sizes.experts)
    inputs = make_inputs(kernel, sizes, ids, bits, np.random.default_rng(seed))
    found = run(kernel, inputs, profile)
    assert all(np.isfinite(y.astype(np.float32)).all() for y in found)  # they begin as NaN
    assert_close(kernel, inputs, found, list(run_body(kernel.operator, inputs, attributes_of(kernel))))
    assert (found[0][ids < 0].astype(np.float32) == 0).all()


def ragged(test: Callable[..., None]) -> Callable[..., None]:
    """Examples whose last block of channels is not full: one or two blocks of scales in the last tile, both profiles.

    Every expert has tokens, the last one too: behind its scales there is nothing.
    """
    for channels in (130, 212, 300):
        for profile in (DECODE, PREFILL):
            test = example(
                tokens=6, experts=3, channels=channels, depth=140, padding=1, profile=profile, seed=channels
            )(test)
    return test


@each_kernel
@EXAMPLES
@ragged
@given(
    tokens=st.integers(1, 20),
    experts=st.integers(1, 5),
    channels=st.integers(1, 300) | st.sampled_from([64, 128, 256]),
    depth=st.integers(1, 300) | st.sampled_from([64, 128, 256]),
    padding=st.integers(0, 3),
    profile=st.sampled_from([DECODE, PREFILL]),
    seed=st.integers(0, 2**32 - 1),
)
def test_experts_equal_their_body(
    kernel: Kernel, tokens: int, experts: int, channels: int, depth: int, padding: int, profile: int, seed: int
) -> None:
    """For sizes that are no multiples of anything, with padding rows and experts without a token."""
    rng = np.random.default_rng(seed)
    per_token = int(rng.integers(1, experts + 1))
    ids, _ = choose(rng, tokens, experts, per_token, min(padding, tokens), shared=int(rng.integers(0, 2)))
    check(kernel, Sizes(tokens, experts, channels, depth), ids, profile, seed)


@each_kernel
@pytest.mark.parametrize("profile", [DECODE, PREFILL])
def test_all_tokens_on_one_expert(kernel: Kernel, profile: int) -> None:
    """Several row tiles of one expert, the last not full, beside experts without any; more than 128 tokens."""
    ids = np.full((150, 1), 2, np.int32)
    check(kernel, Sizes(150, 4, 40, 72), ids, profile)


@each_kernel
@pytest.mark.parametrize("profile", [DECODE, PREFILL])
def test_rows_beyond_the_words_read_in_one_step(kernel: Kernel, profile: int) -> None:
    """Tokens far behind each other share a tile: 600 of them, one in seven on the same expert."""
    ids = np.where(np.arange(600) % 7 == 3, 1, -1).astype(np.int32)[:, None]
    check(kernel, Sizes(600, 2, 16, 16), ids, profile)


@each_kernel
def test_only_padding_gives_zeros_and_reads_no_expert(kernel: Kernel) -> None:
    """Weights and rows are NaN: nothing of them may come through, and nothing of them is read."""
    ids = np.full((9, 3), -1, np.int32)
    inputs = make_inputs(kernel, Sizes(9, 4, 130, 136), ids, expert_tokens(ids, 4), np.random.default_rng(0))
    inputs = [np.full(x.shape, np.nan).astype(x.dtype) if x.dtype != np.int32 else x for x in inputs]
    found = run(kernel, inputs, unread_from=(0,) * (len(inputs) - 2))
    for y, body in zip(found, run_body(kernel.operator, inputs, attributes_of(kernel)), strict=True):
        np.testing.assert_array_equal(y.astype(np.float32), body.astype(np.float32))


@each_kernel
@pytest.mark.parametrize("profile", [DECODE, PREFILL])
def test_experts_without_tokens_and_padding_rows_are_not_used(kernel: Kernel, profile: int) -> None:
    """They are not even read, and the result is the same when they are NaN."""
    sizes = Sizes(12, 5, 130, 200)
    ids, bits = choose(np.random.default_rng(1), 12, 4, 2, padding=5)  # nobody takes expert 4
    inputs = make_inputs(kernel, sizes, ids, np.pad(bits, ((0, 1), (0, 0))), np.random.default_rng(2))
    step = 2 if is_fp8(kernel) else 1
    clean = run(kernel, inputs, profile, unread_from=(7,) * step + (4,) * (len(inputs) - 2 - step))
    for i, x in enumerate(inputs[:-2]):
        (x[7:] if i < step else x[4:]).fill(np.nan)
    for before, after in zip(clean, run(kernel, inputs, profile), strict=True):
        np.testing.assert_array_equal(before.astype(np.float32), after.astype(np.float32))


@each_kernel
@EXAMPLES
@given(
    tokens=st.integers(1, 40), profile=st.sampled_from([DECODE, PREFILL]), small=st.booleans(), seed=st.integers(0, 99)
)
def test_any_integers_are_safe(kernel: Kernel, tokens: int, profile: int, small: bool, seed: int) -> None:
    """Random ids and bits: no access outside the tensors (the interpreter checks), every output written and finite."""
    rng = np.random.default_rng(seed)
    low, high = (-2, 5) if small else (-(2**31), 2**31)
    ids = rng.integers(low, high, (tokens, 3)).astype(np.int32)
    bits = rng.integers(-(2**31), 2**31, (4, -(-tokens // 128) * 4)).astype(np.int32)
    inputs = make_inputs(kernel, Sizes(tokens, 4, 30, 40), ids, bits, rng)
    for y in run(kernel, inputs, profile):
        assert np.isfinite(y.astype(np.float32)).all()


@each_kernel
def test_rows_do_not_depend_on_the_batch(kernel: Kernel) -> None:
    """Bit for bit: a token alone, among others, and in every profile's tile (products added in the order of K)."""
    sizes = Sizes(70, 3, 130, 328)
    ids, bits = choose(np.random.default_rng(0), 70, 3, 2)
    inputs = make_inputs(kernel, sizes, ids, bits, np.random.default_rng(5))
    rows = 2 if is_fp8(kernel) else 1
    alone = [x[69:] if i < rows else x for i, x in enumerate(inputs[:-2])]
    first = run(kernel, [*alone, ids[69:], expert_tokens(ids[69:], 3)], DECODE, ordered=True)
    for profile in (DECODE, PREFILL):
        batch = run(kernel, inputs, profile, ordered=True)
        for one, many in zip(first, batch, strict=True):
            np.testing.assert_array_equal(one[0].view(np.uint8), many[69].view(np.uint8))


@pytest.mark.parametrize("kernel", [GATE_UP, DOWN], ids=lambda kernel: kernel.operator.name)
def test_f32_is_refused(kernel: Kernel) -> None:
    """f32 bundles never reach a GPU: the message says so."""
    ids, bits = choose(np.random.default_rng(0), 2, 2, 1)
    inputs = make_inputs(kernel, Sizes(2, 2, 8, 16), ids, bits, np.random.default_rng(0))
    with pytest.raises(ValueError, match="f32 bundles run on the CPU target"):
        run(kernel, [x.astype(np.float32) if x.dtype == BF16 else x for x in inputs])


@pytest.mark.parametrize(
    ("kernel", "tile"),
    [
        (FP8_GATE_UP, Tile(m=8, n=128)),
        (FP8_GATE_UP, Tile(m=16, n=64)),
        (FP8_GATE_UP, Tile(m=64, n=128, k=64)),
        (FP8_DOWN, Tile(m=16, n=256)),
        (FP8_DOWN, Tile(m=64, n=128)),
        (DOWN, Tile(m=16, n=32)),
        (GATE_UP, Tile(m=16, n=64, k=16)),
    ],
)
def test_tiles_without_code_are_refused(kernel: Kernel, tile: Tile) -> None:
    """A tuning table with such a tile must not give wrong results."""
    dims = {"E": 4, "k": 2, "I": 256, "H": 256, "T": 1}
    types = dict.fromkeys(("x", "gate", "up", "inner", "down"), ir.DataType.BFLOAT16)
    with pytest.raises(ValueError, match=r"tile"):
        kernel.constants(dims, types, tile)
