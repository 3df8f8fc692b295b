"""PagedAttention's and AttentionMerge's kernels together, in the interpreter, against PagedAttention's body.

Scores, exponents and sums are f32 in both; bf16 operands round the exponents to bf16 before they meet the values, as
the tensor core takes them, which the body does not.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.attention import BF16, Call, Inputs, Shape, attend, attend_part, attention_inputs
from support.bodies import run_body
from support.interpreter import FEW_SMS, run_interpreted, to_numpy, to_torch

from angelforge.plugins.attention_merge.kernel import KERNEL as MERGE
from angelforge.plugins.kernel import Tile
from angelforge.plugins.paged_attention.kernel import KERNEL

EXAMPLES = settings(max_examples=max(10, settings().max_examples // 5))
SPLIT, QUERIES = 32, 4
DECODE = Tile(m=16, n=32, k=4, warps=4, stages=3)
PROMPT = Tile(m=64, n=64, k=2, warps=4, stages=2)
MERGING = Tile(m=1, n=128, k=4, stages=2)


def _attributes(shape: Shape) -> dict[str, int | float]:
    return {"scale": shape.scale, "split_length": SPLIT, "split_queries": QUERIES}


def _parts(inputs: Inputs, shape: Shape, tile: Tile) -> list[np.ndarray]:
    """direct, partial, lse, partial_start of the kernel."""
    tensors = [to_torch(array) for array in inputs.arrays()]
    return [to_numpy(x) for x in run_interpreted(KERNEL, tensors, _attributes(shape), gpu=FEW_SMS, tile=tile)]


def _merged(inputs: Inputs, parts: list[np.ndarray]) -> np.ndarray:
    tensors = [to_torch(array) for array in (*parts, inputs.query_start, inputs.kv_length)]
    (attended,) = run_interpreted(MERGE, tensors, {"split_length": SPLIT}, gpu=FEW_SMS, tile=MERGING)
    return to_numpy(attended).astype(np.float32).reshape(inputs.query.shape)


def _body(inputs: Inputs, shape: Shape) -> np.ndarray:
    return run_body(KERNEL.operator, inputs.arrays(), _attributes(shape))[0].astype(np.float32)


def _assert_close(found: np.ndarray, expected: np.ndarray, dtype: type) -> None:
    if dtype is BF16:
        np.testing.assert_allclose(found, expected, atol=0.02, rtol=0.01)
        assert np.sqrt(np.mean((found - expected) ** 2)) <= 3e-3 * max(1.0, np.sqrt(np.mean(expected**2)))
    else:
        np.testing.assert_allclose(found, expected, atol=2e-6, rtol=2e-6)


SEQUENCES = st.tuples(
    st.sampled_from([0, 1, 5, 31, 32, 33, 62, 63, 64, 65, 100, 127]),  # keys before
    st.sampled_from([0, 1, 1, 1, 2, 3, 4, 5, 9, 20]),  # new tokens
)
CALLS = st.builds(
    Call,
    sequences=st.lists(SEQUENCES, min_size=1, max_size=5).map(tuple).filter(lambda s: sum(n for _, n in s) > 0),
    padding_tokens=st.sampled_from([0, 0, 1, 3]),
    spare_pages=st.sampled_from([0, 3]),
    seed=st.integers(0, 1000),
)
SHAPES = st.builds(
    Shape,
    kv_heads=st.sampled_from([1, 2]),
    heads=st.sampled_from([2, 4, 8]),
    head_dim=st.sampled_from([32, 64]),
    page_size=st.sampled_from([16, 64, 24]),  # several pages a tile, several tiles a page, neither
    dtype=st.sampled_from([np.float32, np.float32, BF16]),
)


@EXAMPLES
@given(CALLS, SHAPES, st.sampled_from([DECODE, PROMPT]))
def test_kernels_and_body_agree(call: Call, shape: Shape, tile: Tile) -> None:
    """For any mix of prompts, decodes and verifications, and NaN wherever a sequence has no key; padding gives 0."""
    inputs = attention_inputs(call, shape)
    parts = _parts(inputs, shape, tile)
    merged, expected = _merged(inputs, parts), _body(inputs, shape)
    _assert_close(merged, expected, shape.dtype)
    assert (merged[int(inputs.query_start[-1]) :] == 0).all()


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "dtype", "tile"),
    [
        (4, 4, 32, np.float32, DECODE),
        (8, 2, 64, BF16, PROMPT),
        (16, 2, 128, BF16, DECODE),
        (8, 1, 128, np.float32, PROMPT),
    ],
)
def test_page_boundaries(heads: int, kv_heads: int, head_dim: int, dtype: type, tile: Tile) -> None:
    """63, 64 and 65 keys in pages of 64, decoding, verifying 4 tokens and in a chunk of a prompt; groups of 1, 4, 8."""
    shape = Shape(heads, kv_heads, head_dim, 64, dtype)
    inputs = attention_inputs(Call(((62, 1), (60, 4), (64, 1), (0, 0), (59, 6)), padding_tokens=1), shape)
    _assert_close(_merged(inputs, _parts(inputs, shape, tile)), _body(inputs, shape), dtype)


@pytest.mark.parametrize("tile", [DECODE, PROMPT])
@pytest.mark.parametrize("sequence", [(40, 1), (10, 6), (0, 20)])
def test_what_is_no_number_shows(sequence: tuple[int, int], tile: Tile) -> None:
    """A NaN in a visible key is one in the rows that see it, as in the body, whether parts are joined or not."""
    shape = Shape()
    inputs = attention_inputs(Call((sequence,)), shape)
    inputs.kv_cache[inputs.page_table[0, 0], 0, 0, 3, 5] = np.nan
    expected = np.isnan(_body(inputs, shape))
    assert expected.any()
    np.testing.assert_array_equal(np.isnan(_merged(inputs, _parts(inputs, shape, tile))), expected)


def test_parts_are_what_the_operator_says() -> None:
    """Rows are given out in order; a part's result and lse are those of its keys, −inf where none is visible."""
    shape = Shape(heads=4, kv_heads=2)
    call = Call(((70, 2), (0, 0), (3, 5), (95, 1), (0, 1)))
    inputs = attention_inputs(call, shape)
    inputs.positions[:2] = [20, 71]  # the first token sees its first part only
    direct, partial, lse, start = _parts(inputs, shape, DECODE)
    assert start.tolist() == [0, -1, -1, 6, 9]
    assert direct.shape == inputs.query.shape
    for sequence in (0, 3, 4):
        keys, values = inputs.keys_and_values(sequence)
        first, last = inputs.query_start[sequence : sequence + 2]
        length = int(inputs.kv_length[sequence])
        count = -(-length // SPLIT)
        visible = np.arange(length)[None] <= inputs.positions[first:last, None]
        for part in range(count):
            own = slice(part * SPLIT, (part + 1) * SPLIT)
            rows = start[sequence] + np.arange(last - first) * count + part
            result, expected = attend_part(
                inputs.query[first:last], keys[:, own], values[:, own], visible[:, own], shape.scale
            )
            np.testing.assert_allclose(partial[rows], result, atol=2e-6)
            np.testing.assert_allclose(lse[rows], expected, atol=2e-6)
    assert np.isneginf(lse[1:3]).all()  # parts 1 and 2 of the first token
    assert (partial[1:3] == 0).all()


@pytest.mark.parametrize("tile", [DECODE, PROMPT])
def test_positions_decide_what_is_seen(tile: Tile) -> None:
    """Positions in any order, repeated, anywhere in the sequence: row p sees keys ≤ p; a negative one sees nothing."""
    shape = Shape(heads=2, kv_heads=1)
    inputs = attention_inputs(Call(((60, 3), (60, 9))), shape)
    inputs.positions[:] = [40, 2, 62, 68, 0, 33, 33, 31, 32, 5, -1, 64]
    found = _merged(inputs, _parts(inputs, shape, tile))
    for sequence in (0, 1):
        keys, values = inputs.keys_and_values(sequence)
        rows = slice(*inputs.query_start[sequence : sequence + 2])
        visible = np.arange(keys.shape[1])[None] <= inputs.positions[rows, None]
        expected = attend(inputs.query[rows], keys, values, visible, shape.scale)
        np.testing.assert_allclose(found[rows], expected, atol=2e-6)


@pytest.mark.parametrize("tile", [DECODE, PROMPT])
def test_a_result_does_not_depend_on_company(tile: Tile) -> None:
    """Bit for bit: a sequence alone, and the same one behind others, in other pages and with padding."""
    shape = Shape(heads=8, kv_heads=2, dtype=BF16)
    alone = attention_inputs(Call(((70, 3),)), shape)
    crowd = attention_inputs(Call(((33, 1), (0, 7), (70, 3), (12, 2)), padding_tokens=2, seed=5), shape)
    crowd.query[8:11] = alone.query
    keys, values = alone.keys_and_values(0)
    for place in range(73):
        page = crowd.page_table[2, place // shape.page_size]
        crowd.kv_cache[page, :, :, place % shape.page_size] = np.stack([keys[:, place], values[:, place]])
    first = _merged(alone, _parts(alone, shape, tile))
    second = _merged(crowd, _parts(crowd, shape, tile))
    np.testing.assert_array_equal(first, second[8:11])


@pytest.mark.parametrize("tile", [DECODE, PROMPT])
def test_a_sequence_without_room_for_its_parts(tile: Tile) -> None:
    """Sequences that share pages can want more rows than the pool has keys: the last ones are computed whole.

    They are joined in registers in the order and arithmetic of AttentionMerge: to the last bit in nearly all elements,
    and in all of them up to the order in which NumPy multiplies matrices of other sizes.
    """
    shape = Shape(heads=4, kv_heads=2)
    few = attention_inputs(Call(((120, 4),), spare_pages=0), shape)
    count = 6
    shared = Inputs(
        query=np.tile(few.query, (count, 1, 1)),
        kv_cache=few.kv_cache,
        page_table=np.tile(few.page_table, (count, 1)),
        query_start=np.arange(count + 1, dtype=np.int32) * 4,
        kv_length=np.tile(few.kv_length, count),
        positions=np.tile(few.positions, count),
    )
    parts = _parts(shared, shape, tile)
    assert parts[3].tolist() == [0, 16, -1, -1, -1, -1]
    merged = _merged(shared, parts).reshape(count, *few.query.shape)
    _assert_close(merged, np.tile(_body(few, shape), (count, 1, 1, 1)), np.float32)
    assert (merged[0] == merged[3]).mean() > 0.95
    np.testing.assert_allclose(merged[0], merged[3], rtol=0, atol=2.5e-7)


def _last_row(call: Call, tile: Tile, like: Inputs | None) -> tuple[np.ndarray, Inputs]:
    """(bits of the last token's row, the inputs), products added in order; cache and query of `like` where given."""
    inputs = attention_inputs(call, Shape(heads=8, kv_heads=1, dtype=BF16))
    if like is not None:
        inputs.kv_cache[:], inputs.page_table[:], inputs.query[-1] = like.kv_cache, like.page_table, like.query[-1]
    tensors = [to_torch(array) for array in inputs.arrays()]
    attributes = {"scale": 0.25, "split_length": SPLIT, "split_queries": QUERIES}
    parts = run_interpreted(KERNEL, tensors, attributes, gpu=FEW_SMS, tile=tile, ordered=True)
    merging = [*parts, *tensors[3:5]]
    (attended,) = run_interpreted(MERGE, merging, {"split_length": SPLIT}, gpu=FEW_SMS, tile=MERGING, ordered=True)
    return to_numpy(attended)[-1].view(np.uint16), inputs


@pytest.mark.parametrize(
    ("tokens", "tile"),
    [(1, PROMPT), (3, DECODE), (3, PROMPT), (20, DECODE)],
    ids=["decoded in the profile of prompts", "verified", "verified beside prompts", "in a small chunk"],
)
def test_decoding_verification_and_small_chunks_give_the_same_bits(tokens: int, tile: Tile) -> None:
    """A token's row over one cache, whatever came with it in the step; 10 parts of keys, the last one not full.

    Prompts in the profile of prompts are left out: they have another arithmetic (docs/operators.md).
    """
    decoded, inputs = _last_row(Call(((299, 1),)), DECODE, None)
    found, _ = _last_row(Call(((300 - tokens, tokens),)), tile, inputs)
    np.testing.assert_array_equal(found, decoded)


def test_more_sequences_than_are_listed_at_once() -> None:
    """Rows and pieces go on over chunks of sequences, empty ones among them."""
    shape = Shape(heads=2, kv_heads=1)
    inputs = attention_inputs(Call(tuple((7 * i % 40, i % 3) for i in range(11)), padding_tokens=2), shape)
    parts = _parts(inputs, shape, DECODE)
    counts, lengths = np.diff(inputs.query_start), inputs.kv_length
    wanted = counts * -(-lengths // SPLIT)
    expected = np.where(wanted > 0, np.cumsum(wanted) - wanted, -1)
    np.testing.assert_array_equal(parts[3], expected)
    _assert_close(_merged(inputs, parts), _body(inputs, shape), np.float32)


@pytest.mark.parametrize(("attribute", "value"), [("scale", 0.0), ("split_length", 40)])
def test_what_the_kernel_cannot_do_is_refused(attribute: str, value: float) -> None:
    shape = Shape(heads=2, kv_heads=1)
    tensors = [to_torch(array) for array in attention_inputs(Call(((3, 1),)), shape).arrays()]
    with pytest.raises(ValueError, match=attribute):
        run_interpreted(KERNEL, tensors, {**_attributes(shape), attribute: value})
