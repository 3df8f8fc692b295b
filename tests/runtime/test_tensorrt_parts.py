"""The parts of the TensorRT runtime that need no device: sizes and memory of steps, bindings, memory of the pool."""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from angelforge.dtypes import DType
from angelforge.engines.profiles import StepLimits, make_profiles
from angelforge.errors import AngelForgeError, UsageError
from angelforge.runtime.batch import INPUTS, Batch
from angelforge.runtime.device import open_device
from angelforge.runtime.packing import Padding, Piece, pack
from angelforge.runtime.tensorrt_bindings import Tensor, sort_tensors
from angelforge.runtime.tensorrt_buckets import Buckets, sizes_of
from angelforge.runtime.tensorrt_inputs import ROWS, InputArena, InputLayout
from angelforge.runtime.tensorrt_memory import DeviceNeeds, PoolWish, choose_pages

PAGE = 64
REAL = StepLimits(max_tokens=8192, max_batch=32, max_context=131_072, page_size=PAGE, pages=20_000, draft_depth=3)


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Any packed call of a few sequences over pages 1, 2, …"""
    pieces, page = [], 1
    for _ in range(draw(st.integers(1, 5))):
        count, start = draw(st.integers(1, 70)), draw(st.integers(0, 130))
        pages = -(-(start + count) // PAGE)
        tokens = np.arange(count) + draw(st.integers(0, 99))
        pieces.append(Piece(tokens, start, np.arange(page, page + pages, dtype=np.int32), draw(st.integers(0, count))))
        page += pages
    return pack(pieces, PAGE)


@given(batch=batches(), room=st.tuples(*[st.integers(0, 40)] * 4))
def test_one_copy_brings_the_padded_batch(batch: Batch, room: tuple[int, int, int, int]) -> None:
    """Every input arrives as `pack` pads it, but for page numbers that nothing needs; aligned, none over another."""
    needed = sizes_of(batch)
    size = Padding(needed.tokens + room[0], needed.sequences + room[1], needed.pages + room[2], needed.rows + room[3])
    layout, device = InputLayout(size), open_device("cpu")
    arena = InputArena(device, layout.nbytes)
    rows = np.arange(batch.input_ids.shape[0]) + 7
    arena.send(layout, batch, rows, PAGE, None)
    kinds = {"input_ids": np.int64, "logit_indices": np.int64}
    found = {}
    for name, address in arena.addresses(layout).items():
        assert address % 256 == 0
        if name != ROWS:
            kind = np.dtype(kinds.get(name, np.int32))
            begin, shape = layout.offsets[name], layout.shapes[name]
            octets = arena._arena.numpy()[begin : begin + int(np.prod(shape)) * kind.itemsize]
            found[name] = octets.view(kind).reshape(shape)
    used = -(-found["kv_length"] // PAGE)
    for table, count in zip(found["page_table"], used, strict=True):
        table[count:] = 0
    made = Batch(**found)
    made.check(1000, PAGE, 1000, 1000)
    tokens = batch.input_ids.shape[0]
    for name in ("input_ids", "positions", "slots"):
        assert np.array_equal(found[name][:tokens], getattr(batch, name))
    assert not found["input_ids"][tokens:].any()
    assert np.array_equal(found["logit_indices"][: batch.logit_indices.shape[0]], batch.logit_indices)
    assert np.array_equal(found["kv_length"][: batch.kv_length.shape[0]], batch.kv_length)
    assert arena.on_device(layout, ROWS).tolist() == [*rows.tolist(), *[0] * room[0]]
    ends = sorted((layout.offsets[name], found[name].nbytes) for name in found)
    assert all(begin + nbytes <= after for (begin, nbytes), (after, _) in pairwise(ends))


def test_an_earlier_step_leaves_no_trace() -> None:
    """The same stretch of memory serves steps of every size, one after another."""
    layout = InputLayout(Padding(40, 4, 3, 8))
    arena = InputArena(open_device("cpu"), layout.nbytes)
    first = pack([Piece(np.arange(40), 100, np.array([1, 2, 3], np.int32), 8)], PAGE)
    second = pack([Piece(np.array([5]), 3, np.array([9], np.int32), 1)], PAGE)
    arena.send(layout, first, None, PAGE, None)
    arena.send(layout, second, None, PAGE, None)
    views = arena._views_of(layout)
    padded = pack([Piece(np.array([5]), 3, np.array([9], np.int32), 1)], PAGE, Padding(40, 4, 3, 8))
    for name in INPUTS:
        if name != "page_table":
            assert np.array_equal(views[name], getattr(padded, name)), name


def step(tokens: int, sequences: int, rows: int) -> Batch:
    """A batch of such sizes."""
    share = [tokens // sequences] * (sequences - 1) + [tokens - tokens // sequences * (sequences - 1)]
    wanted = [min(count, max(rows - sum(share[:i]), 0)) for i, count in enumerate(share)]
    return pack(
        [
            Piece(np.zeros(n, np.int64), 0, np.arange(1, 99, dtype=np.int32), w)
            for n, w in zip(share, wanted, strict=True)
        ],
        99,
    )


def test_buckets_of_the_real_model() -> None:
    """Batches of 1, 2, 4 … 32, with one token each and with four; each in the smallest profile that takes it."""
    profiles = make_profiles(REAL)
    buckets = Buckets(profiles, 32, 3)
    sizes = {(bucket.size.tokens, bucket.size.sequences) for bucket in buckets.captured}
    assert sizes == {(b * each, b) for b in (1, 2, 4, 8, 16, 32) for each in (1, 4)}
    for bucket in buckets.captured:
        most = [profile.tokens.most for profile in profiles]
        assert bucket.profile == next(i for i, tokens in enumerate(most) if bucket.size.tokens <= tokens)
        assert bucket.size.pages == 2048


@given(sequences=st.integers(1, 32), data=st.data())
def test_the_smallest_bucket_is_taken(sequences: int, data: st.DataObject) -> None:
    """At most twice the tokens where all sequences decode alike, and no smaller bucket would do."""
    buckets = Buckets(make_profiles(REAL), 32, 3)
    each = data.draw(st.sampled_from([1, 4]))
    chosen, captured = buckets.choose(step(sequences * each, sequences, sequences * each))
    assert captured
    assert sequences <= chosen.size.sequences
    assert sequences * each <= chosen.size.tokens < 2 * sequences * each or sequences == 1
    tokens = data.draw(st.integers(sequences, 128))
    found, captured = buckets.choose(step(tokens, sequences, 1))
    assert captured
    assert found.size.tokens >= tokens
    smaller = [b for b in buckets.captured if b.size.tokens < found.size.tokens]
    assert all(b.size.tokens < tokens or b.size.sequences < sequences for b in smaller)


def test_prompts_are_padded_to_few_sizes() -> None:
    """So many contexts are made at most, whatever comes; a third of a step is padding at most."""
    buckets = Buckets(make_profiles(REAL), 32, 3)
    chosen, captured = buckets.choose(step(200, 3, 1))
    assert (chosen.size, chosen.profile, captured) == (Padding(256, 32, 2048, 128), 2, False)
    chosen, _ = buckets.choose(step(257, 3, 1))
    assert (chosen.size.tokens, chosen.profile) == (384, 3)
    found = {tokens: buckets.choose(step(tokens, 1, 0))[0] for tokens in range(129, 8193)}
    assert {bucket.size.tokens for bucket in found.values()} == {
        *(2**i for i in range(8, 14)),  # 256 … 8192
        *(3 * 2**i for i in range(6, 12)),  # 192 … 6144
    }
    assert all(bucket.size.tokens - tokens < bucket.size.tokens / 3 for tokens, bucket in found.items())
    with pytest.raises(AngelForgeError, match="A step has 8193 tokens of 1 sequences"):
        buckets.choose(step(8193, 1, 1))


@given(st.integers(1, 300), st.integers(1, 9), st.integers(0, 3), st.data())
def test_every_step_that_the_engine_takes_has_a_size(most: int, batch: int, depth: int, data: st.DataObject) -> None:
    """Whatever it was built for, and however few sequences are to run at once; the size is one of its profile."""
    batch = min(batch, most // (1 + depth)) or 1
    limits = StepLimits(max(most, 1 + depth), batch, 512, PAGE, 20, depth)
    profiles = make_profiles(limits)
    buckets = Buckets(profiles, data.draw(st.integers(1, batch)), data.draw(st.sampled_from([0, depth])))
    sequences = data.draw(st.integers(1, batch))
    tokens = data.draw(st.integers(sequences, limits.max_tokens))
    rows = data.draw(st.integers(0, min(tokens, limits.verified_tokens)))
    chosen, _ = buckets.choose(step(tokens, sequences, rows))
    size, profile = chosen.size, profiles[chosen.profile]
    assert sequences <= size.sequences <= profile.batch.most
    assert max(rows, 1) <= size.rows <= profile.logit_rows.most
    assert tokens <= size.tokens <= profile.tokens.most
    assert size.pages <= profile.pages_per_sequence.most


def tensors() -> list[Tensor]:
    """Those of a two-layer engine, shuffled."""
    pool = (-1, 2, 4, 64, 128)
    found = [Tensor(name, True, DType.I32, (-1,)) for name in INPUTS]
    found += [Tensor(f"kv_cache.{i}", True, DType.BF16, pool) for i in range(2)]
    found += [Tensor(f"kv_cache_out.{i}", False, DType.BF16, pool) for i in range(2)]
    found += [Tensor("logits", False, DType.F32, (-1, 99)), Tensor("w", True, DType.F8_E4M3, (7, 8))]
    return found[::-1]


def test_tensors_are_sorted_by_what_they_are() -> None:
    found = sort_tensors(tensors(), (), ("logits",))
    assert [pool.name for pool in found.pools] == ["kv_cache.0", "kv_cache.1"]
    assert list(found.weights) == ["w"]
    assert list(found.outputs) == ["logits"]
    assert found.page_bytes == 2 * 2 * 4 * 64 * 128 * 2
    addresses = found.pool_addresses(512, 3)
    assert addresses["kv_cache.1"] == addresses["kv_cache_out.1"] == 512 + 3 * found.page_bytes // 2


def test_an_engine_of_another_graph_is_told() -> None:
    with pytest.raises(AngelForgeError, match=r"has no hidden, draft_hidden, kv_cache_out\.1: it was built"):
        without = [tensor for tensor in tensors() if tensor.name != "kv_cache_out.1"]
        sort_tensors(without, ("hidden",), ("draft_hidden", "logits"))


NEEDS = DeviceNeeds(weights=50_000, activations=3_000, steps=2_000, page=100)


def pages(free: int, **wish: int | None) -> int:
    asked = SimpleNamespace(**{"num_pages": None, "kv_memory": None, "useful": 10_000, "most": 700} | wish)
    return choose_pages(NEEDS, free, PoolWish(**vars(asked)), reserve=1_000)


def test_the_pool_takes_what_is_left() -> None:
    """Within what the engine takes, what is useful, and what was asked for."""
    assert pages(56_000 + 33_333) == 333
    assert pages(10**9) == 700
    assert pages(10**9, useful=30) == 30
    assert pages(10**9, kv_memory=5_150) == 51
    assert pages(10**9, num_pages=699) == 699


@pytest.mark.parametrize("wish", [{}, {"num_pages": 50}, {"kv_memory": 5000}])
def test_too_small_a_device_is_told_with_both_figures(wish: dict[str, int]) -> None:
    with pytest.raises(AngelForgeError, match=r"needs 0\.00 GB of device memory .* but 0\.00 GB are free"):
        pages(56_100, **wish)


@pytest.mark.parametrize("wish", [{"num_pages": 1}, {"num_pages": 701}, {"kv_memory": 150}])
def test_impossible_wishes_are_told(wish: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        pages(10**9, **wish)
