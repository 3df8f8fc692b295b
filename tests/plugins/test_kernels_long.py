"""The longest calls: 131,072 keys of a sequence, and 8192 tokens of a step, with few and small heads and experts.

`make test` runs some of each kernel's programs, `make test-full` all of them.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from support.attention import Inputs, attend, attend_part
from support.bodies import run_body
from support.expert_inputs import Sizes, assert_close, attributes_of, make_inputs
from support.interpreter import one_program, run_interpreted, to_numpy, to_torch
from support.routing import choose, expert_tokens

from angelforge.plugins.attention_merge.kernel import KERNEL as MERGE
from angelforge.plugins.fp8_moe_down.kernel import KERNEL as FP8_DOWN
from angelforge.plugins.fp8_moe_gate_up.kernel import KERNEL as FP8_GATE_UP
from angelforge.plugins.kernel import Gpu, Kernel
from angelforge.plugins.moe_down.kernel import KERNEL as DOWN
from angelforge.plugins.moe_gate_up.kernel import KERNEL as GATE_UP
from angelforge.plugins.moe_route.kernel import KERNEL as ROUTE
from angelforge.plugins.paged_attention.kernel import KERNEL as ATTENTION
from angelforge.plugins.paged_attention.operator import SPLIT_LENGTH, SPLIT_QUERIES

FEW_SMS, ONE_SM = Gpu("sm_90", 7), Gpu("sm_90", 1)
PAGE, DIM, HEADS = 64, 16, 2
LONG_CONTEXT, TOKENS = 131072, 8192


def decoding(lengths: list[int], rng: np.random.Generator) -> Inputs:
    """One token for each sequence of so many keys, in pages of random order."""
    counts = [-(-length // PAGE) for length in lengths]
    order = rng.permutation(np.arange(1, 1 + sum(counts))).astype(np.int32)
    table = np.zeros((len(lengths), max(counts)), np.int32)
    for row, own in zip(table, np.split(order, np.cumsum(counts)[:-1]), strict=True):
        row[: len(own)] = own
    return Inputs(
        query=rng.standard_normal((len(lengths), HEADS, DIM)).astype(np.float32),
        kv_cache=rng.standard_normal((1 + sum(counts), 2, 1, PAGE, DIM)).astype(np.float32),
        page_table=table,
        query_start=np.arange(len(lengths) + 1, dtype=np.int32),
        kv_length=np.array(lengths, np.int32),
        positions=np.array(lengths, np.int32) - 1,
    )


def run_program(
    index: int, count: int, kernel: Kernel, inputs: list[np.ndarray], attributes: Mapping[str, Any], **options: Any
) -> list[np.ndarray]:
    """The outputs of program `index` of `count` alone; what it does not write is NaN or −1."""
    alone = replace(kernel, grid=lambda dims, gpu, tile: (1, 1, 1))
    with one_program(index, count):
        outputs = run_interpreted(alone, [to_torch(x) for x in inputs], attributes, gpu=ONE_SM, **options)
    return [to_numpy(y) for y in outputs]


@pytest.mark.parametrize(
    "lengths",
    [
        [8192, *[512] * 3],
        pytest.param([LONG_CONTEXT], marks=pytest.mark.full),
        pytest.param([LONG_CONTEXT, *[4096] * 31], marks=pytest.mark.full),
    ],
    ids=["8K beside 3 at 512", "128K", "128K beside 31 at 4K"],
)
def test_a_long_context_alone_and_beside_short_ones(lengths: list[int]) -> None:
    """Attention in parts, joined, is that of all keys in float64; partial buffers are bounded by the pool."""
    inputs = decoding(lengths, np.random.default_rng(2))
    tensors = [to_torch(array) for array in inputs.arrays()]
    attributes = {"scale": 0.25, "split_length": SPLIT_LENGTH, "split_queries": SPLIT_QUERIES}
    parts = run_interpreted(ATTENTION, tensors, attributes, gpu=FEW_SMS, profile_tokens=64)
    bound = (len(inputs.kv_cache) * PAGE // SPLIT_LENGTH + len(lengths)) * SPLIT_QUERIES
    assert parts[1].shape == (bound, HEADS, DIM)
    merging = [*parts, *tensors[3:5]]
    (merged,) = run_interpreted(MERGE, merging, {"split_length": SPLIT_LENGTH}, gpu=FEW_SMS, profile_tokens=64)
    found = to_numpy(merged).reshape(len(lengths), HEADS, DIM)
    for row, length in enumerate(lengths):
        keys, values = inputs.keys_and_values(row)
        expected = attend(inputs.query[row : row + 1], keys, values, np.ones((1, length), bool), 0.25)
        np.testing.assert_allclose(found[row], expected[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("shorter", [(), (4096,) * 31], ids=["128K", "128K beside 31 at 4K"])
def test_parts_of_a_long_context(shorter: tuple[int, ...]) -> None:
    """The first, middle and last part of 131,072 keys and those after it, each by a program of its own."""
    lengths = [LONG_CONTEXT, *shorter]
    inputs = decoding(lengths, np.random.default_rng(2))
    arrays = list(inputs.arrays())
    attributes = {"scale": 0.25, "split_length": SPLIT_LENGTH, "split_queries": SPLIT_QUERIES}
    parts = LONG_CONTEXT // SPLIT_LENGTH
    count = sum(lengths) // SPLIT_LENGTH
    for piece in sorted({0, parts // 2, parts - 1, min(parts, count - 1), count - 1}):
        row, part = (0, piece) if piece < parts else divmod(piece - parts + 16, 16)
        _, partial, log_sum, _ = run_program(piece, count, ATTENTION, arrays, attributes, profile_tokens=64)
        keys, values = inputs.keys_and_values(row)
        own = slice(part * SPLIT_LENGTH, (part + 1) * SPLIT_LENGTH)
        visible = np.ones((1, SPLIT_LENGTH), bool)
        expected, lse = attend_part(inputs.query[row : row + 1], keys[:, own], values[:, own], visible, 0.25)
        np.testing.assert_allclose(partial[piece], expected[0], rtol=0, atol=2e-6)
        np.testing.assert_allclose(log_sum[piece], lse[0], rtol=0, atol=2e-6)


def sparse_rows(every: int) -> np.ndarray:
    """int32 [8192, 1]: of the rows behind the 4096th one in `every` goes to expert 1, all others are padding."""
    row = np.arange(TOKENS)
    return np.where((row > TOKENS // 2) & (row % every == 3), 1, -1).astype(np.int32)[:, None]


def named(*cases: tuple[Kernel, int]) -> pytest.MarkDecorator:
    """Kernels, which share how they find their rows, each in one profile's tile."""
    ids = [f"{kernel.operator.name}-{profile}" for kernel, profile in cases]
    return pytest.mark.parametrize(("kernel", "profile"), cases, ids=ids)


@named((FP8_GATE_UP, 8), (FP8_DOWN, TOKENS), (GATE_UP, TOKENS))
def test_few_of_8192_tokens_have_an_expert(kernel: Kernel, profile: int) -> None:
    """They stand far behind each other, in tiles of both profiles; all other rows are padding and 0."""
    ids = sparse_rows(7 if profile == TOKENS else 397)  # a tile of 16 rows takes the interpreter a second
    inputs = make_inputs(kernel, Sizes(TOKENS, 2, 16, 16), ids, expert_tokens(ids, 2), np.random.default_rng(2))
    tensors = [to_torch(x) for x in inputs]
    attributes = attributes_of(kernel)
    found = [to_numpy(y) for y in run_interpreted(kernel, tensors, attributes, gpu=ONE_SM, profile_tokens=profile)]
    assert_close(kernel, inputs, found, list(run_body(kernel.operator, inputs, attributes)))
    assert (found[0][ids < 0].astype(np.float32) == 0).all()


@named((DOWN, 8), (FP8_GATE_UP, TOKENS))
def test_the_last_tile_of_8192_tokens_on_one_expert(kernel: Kernel, profile: int) -> None:
    """Every seventh row is padding; of all programs only the last works: its rows are those of a small call."""
    ids = np.where(np.arange(TOKENS) % 7 == 3, -1, 1).astype(np.int32)[:, None]
    inputs = make_inputs(kernel, Sizes(TOKENS, 2, 16, 16), ids, expert_tokens(ids, 2), np.random.default_rng(2))
    attributes = attributes_of(kernel)
    rows = np.flatnonzero(ids[:, 0] == 1)
    rows_of_tile = kernel.tile({"T": TOKENS}, profile).m
    tiles = -(-len(rows) // rows_of_tile)
    found = run_program(tiles - 1, tiles, kernel, inputs, attributes, profile_tokens=profile)
    last = rows[(tiles - 1) * rows_of_tile :]
    few = [x[last] if len(x) == TOKENS else x for x in inputs[:-1]]
    few.append(expert_tokens(few[-1], 2))
    body = list(run_body(kernel.operator, few, attributes))
    assert_close(kernel, few, [y[last] for y in found], body)


@pytest.mark.full
@pytest.mark.parametrize("kernel", [FP8_GATE_UP, FP8_DOWN], ids=lambda kernel: kernel.operator.name)
def test_experts_of_8192_tokens(kernel: Kernel) -> None:
    """In the tile of prompts, 100 rows of them padding, one expert with all tokens."""
    rng = np.random.default_rng(2)
    ids, bits = choose(rng, TOKENS, 9, 2, 100, 1)
    inputs = make_inputs(kernel, Sizes(TOKENS, 9, 16, 16), ids, bits, rng)
    tensors = [to_torch(x) for x in inputs]
    found = [
        to_numpy(y) for y in run_interpreted(kernel, tensors, attributes_of(kernel), gpu=FEW_SMS, profile_tokens=TOKENS)
    ]
    assert_close(kernel, inputs, found, list(run_body(kernel.operator, inputs, attributes_of(kernel))))
    assert (found[0][ids < 0].astype(np.float32) == 0).all()


ROUTING = {"top_k": 2, "n_group": 4, "topk_group": 2, "num_shared_experts": 1, "routed_scaling_factor": 2.5}
EXPERTS = 16


def routing_inputs(real: int) -> list[np.ndarray]:
    """MoERoute's of 8192 rows, of which the first `real` are tokens."""
    logits = np.random.default_rng(2).standard_normal((TOKENS, EXPERTS)).astype(np.float32)
    return [logits, np.zeros(EXPERTS, np.float32), np.array([real], np.int32)]


@pytest.mark.parametrize("octet", [TOKENS // 16, TOKENS // 8 - 2, TOKENS // 8 - 1])
def test_routing_of_the_last_of_8192_tokens(octet: int) -> None:
    """Programs in the middle and at the end: choices, weights and the byte of 8 tokens; the last 3 rows are padding."""
    rows = slice(octet * 8, octet * 8 + 8)
    inputs = routing_inputs(TOKENS - 3)
    ids, weights, bits = run_program(octet, TOKENS // 8, ROUTE, inputs, ROUTING)
    body = run_body(ROUTE.operator, inputs, ROUTING)
    np.testing.assert_array_equal(ids[rows], body[0][rows])
    np.testing.assert_allclose(weights[rows], body[1][rows], rtol=1e-5)
    np.testing.assert_array_equal(bits.view(np.uint8)[:, octet], body[2].view(np.uint8)[:, octet])


@pytest.mark.full
def test_routing_of_8192_tokens() -> None:
    """Choices and weights are the body's, the bits by expert say the same; padding is routed nowhere."""
    experts, real, attributes = EXPERTS, TOKENS - 92, ROUTING
    inputs = routing_inputs(real)
    tensors = [to_torch(x) for x in inputs]
    ids, weights, bits = (
        to_numpy(y) for y in run_interpreted(ROUTE, tensors, attributes, gpu=FEW_SMS, profile_tokens=TOKENS)
    )
    body = run_body(ROUTE.operator, inputs, attributes)
    np.testing.assert_array_equal(ids, body[0])
    np.testing.assert_allclose(weights, body[1], rtol=1e-5)
    np.testing.assert_array_equal(bits, expert_tokens(ids, experts + 1))
    assert (ids[real:] == -1).all()


@pytest.mark.full
def test_a_prompt_of_8192_tokens() -> None:
    """In one call, beside a sequence that is decoded, an empty one and 60 padding rows."""
    rng, prompt = np.random.default_rng(2), TOKENS - 61
    counts = np.array([prompt, 1, 0])
    inputs = decoding([prompt, 70, 1], rng)
    lengths = np.array([prompt, 70, 0], np.int32)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    positions = np.concatenate([np.arange(prompt), [69], np.zeros(60)]).astype(np.int32)
    query = rng.standard_normal((TOKENS, HEADS, DIM)).astype(np.float32)
    packed = [query, inputs.kv_cache, inputs.page_table, starts, lengths, positions]
    tensors = [to_torch(array) for array in packed]
    attributes = {"scale": 0.25, "split_length": SPLIT_LENGTH, "split_queries": SPLIT_QUERIES}
    parts = run_interpreted(ATTENTION, tensors, attributes, gpu=FEW_SMS, profile_tokens=TOKENS)
    merging = [*parts, *tensors[3:5]]
    (merged,) = run_interpreted(MERGE, merging, {"split_length": SPLIT_LENGTH}, gpu=FEW_SMS, profile_tokens=TOKENS)
    found = to_numpy(merged).reshape(TOKENS, HEADS, DIM)
    whole = replace(inputs, kv_length=lengths)
    for row, own in ((0, slice(0, prompt)), (1, slice(prompt, prompt + 1))):
        keys, values = whole.keys_and_values(row)
        for first in range(own.start, own.stop, 512):
            part = slice(first, min(first + 512, own.stop))
            seen = np.arange(keys.shape[1]) <= positions[part, None]
            np.testing.assert_allclose(found[part], attend(query[part], keys, values, seen, 0.25), rtol=0, atol=1e-5)
    assert (found[prompt + 1 :] == 0).all()
