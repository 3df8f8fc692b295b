"""The kernels that choose tokens, in Triton's interpreter: tokens, logprobs and penalties are those of the host.

Every access is checked: a kernel touches the tensors that it is given and nothing else.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.interpreter import exact_interpreter
from support.paged_engine import PagedEngine

from angelforge import LLM
from angelforge.errors import AngelForgeError
from angelforge.plugins.sampling import kernels
from angelforge.runtime import device_kernels, device_sampling
from angelforge.runtime.device_kernels import KernelWork, Launch
from angelforge.runtime.device_work import Draws, SeenRows
from angelforge.runtime.distribution import adjust, choices
from angelforge.runtime.history import History
from angelforge.runtime.sampling import SamplingParams

REAL = 157_184  # ids of the real model
MIDDLE = 9_001  # more than are listed at most, and no multiple of a group


@pytest.fixture(autouse=True)
def checked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    call = Launch.__call__

    def checked_call(self: Launch, grid: tuple[int, int, int], *arguments: Any) -> None:
        tensors = [each for each in arguments if isinstance(each, torch.Tensor)]
        assert all(each.is_contiguous() and each.data_ptr() % 16 == 0 for each in tensors)
        kinds = {torch.float32: "*fp32", torch.float64: "*fp64", torch.int32: "*i32", torch.int64: "*i64"}
        for name, each in zip(self._kernel.function.arg_names, arguments, strict=False):
            assert each is None or isinstance(each, int) or kinds[each.dtype] == kernels.TYPES[name], name
            assert (each is None) == (name in self._kernel.left_out), name
        with exact_interpreter([], tensors):
            call(self, grid, *arguments)

    monkeypatch.setattr(Launch, "__call__", checked_call)
    yield


def rules_of(params: SamplingParams) -> list[float]:
    return [params.temperature, params.top_k, params.top_p, params.min_p]


def expected(logits: np.ndarray, params: SamplingParams, uniform: float) -> tuple[int, float]:
    """(the host's token, how near the mark is to where another would be taken)."""
    ids, weights = choices(logits, params)
    if not ids.size:
        return -1, 1.0
    order = np.argsort(ids)
    sums = np.cumsum(weights[order])
    mark = uniform * sums[-1]
    return int(ids[order][np.searchsorted(sums, mark, side="right")]), float(np.abs(sums - mark).min())


def choose(
    logits: np.ndarray, params: list[SamplingParams], uniform: np.ndarray, allowed: np.ndarray | None = None
) -> list[int]:
    """A token for each row from the last to the first; `allowed` bool [vocab] for every second one."""
    rows = torch.arange(len(params)).flip(0)
    mask_of = words = None
    if allowed is not None:
        octets = np.packbits(allowed, bitorder="little")
        words = torch.from_numpy(np.pad(octets, (0, -len(octets) % 4)).view(np.int32)[None].copy())
        mask_of = torch.tensor([0 if place % 2 else -1 for place in range(len(params))], dtype=torch.int32)
    rules = torch.tensor([rules_of(each) for each in params], dtype=torch.float64)
    before = logits.copy()
    there = torch.from_numpy(logits)
    draws = Draws(rows, rules, torch.from_numpy(uniform), mask_of, words)
    found: list[int] = KernelWork().choose(there, draws).tolist()
    assert np.array_equal(before, logits, equal_nan=True)
    return found


def compare(
    logits: np.ndarray, params: list[SamplingParams], uniform: np.ndarray, allowed: np.ndarray | None = None
) -> None:
    found = choose(logits, params, uniform, allowed)
    for place, (token, each) in enumerate(zip(found, params, strict=True)):
        row = logits[len(params) - 1 - place]
        if allowed is not None and place % 2:
            row = np.where(allowed, row, np.float32(-np.inf))
        wanted, margin = expected(row, each, uniform[place])
        assert token == wanted or margin < 1e-6, each


# Integers and halves make ties common, and their sums at temperature 1 the same in any order where all are alike.
LOGIT = st.one_of(
    st.integers(-12, 12).map(lambda n: n / 4), st.sampled_from([-0.0, -np.inf]), st.floats(-30, 30, width=32)
)


@st.composite
def params_of(draw: st.DrawFn, vocab: int) -> SamplingParams:
    return SamplingParams(
        temperature=draw(st.sampled_from([0.0, 1e-38, 0.25, 0.7, 1.0, 1.9, 1e39])),
        top_k=draw(st.sampled_from([0, 0, 1, 2, 3, 5, 20, vocab - 1, vocab, vocab + 9])),
        top_p=draw(st.sampled_from([1.0, 0.99, 0.9, 0.61, 0.3, 0.01])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.03, 0.4, 1.0])),
    )


@given(st.data(), st.sampled_from([1, 31, 37, 130]))
def test_tokens_are_the_hosts(data: st.DataObject, vocab: int) -> None:
    """Every rule in any mixture of rows, with many ties, masked rows beside others."""
    count = data.draw(st.integers(1, 3))
    pool = data.draw(st.lists(LOGIT, min_size=5, max_size=40))
    picks = np.random.default_rng(data.draw(st.integers(0, 99)))
    logits = picks.choice(np.array(pool, np.float32), (count, vocab))
    uniform = np.array(data.draw(st.lists(st.floats(0, 1, exclude_max=True), min_size=count, max_size=count)))
    allowed = picks.random(vocab) < 0.5 if data.draw(st.booleans()) else None
    compare(logits, [data.draw(params_of(vocab)) for _ in range(count)], uniform, allowed)


KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    {"temperature": 1.0, "top_k": 150},
    {"temperature": 0.6, "top_p": 0.9},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 0.7, "top_k": 5, "min_p": 0.1},
    {"temperature": 1e-9, "top_p": 0.5},
]
WHOLE: list[dict[str, Any]] = [  # candidates do not decide
    {"temperature": 9.0, "top_p": 0.99},
    {"temperature": 9.0, "top_k": 3000, "top_p": 0.7},
    {"temperature": 9.0, "min_p": 0.01},
]


@pytest.mark.parametrize("kind", KINDS + WHOLE, ids=str)
@pytest.mark.parametrize("ties", [False, True])
def test_rows_of_many_groups(kind: dict[str, Any], ties: bool) -> None:
    """With a mask and without; what is not decided by candidates is found in the row."""
    rng = np.random.default_rng(3)
    logits = (rng.standard_normal((2, MIDDLE)) * 3).astype(np.float32)
    if ties:
        logits = np.round(logits)
    compare(logits, [SamplingParams(**kind)] * 2, rng.random(2), rng.random(MIDDLE) < 0.7)


@pytest.mark.parametrize("kind", [*KINDS, {"temperature": 1.3, "top_p": 0.95}], ids=str)
def test_rows_of_the_real_vocabulary(kind: dict[str, Any]) -> None:
    """The last one's nucleus has more than the first 256 groups' candidates, and less than four times as many."""
    rng = np.random.default_rng(7)
    logits = (rng.standard_normal((1, REAL)) * 3).astype(np.float32)
    logits[:, rng.integers(0, REAL, 700)] += 9
    compare(logits, [SamplingParams(**kind)], rng.random(1))


def test_shares_of_draws() -> None:
    """Numbers spread evenly over [0, 1) give every token its share, by a running sum over rising ids."""
    logits = np.full((1, 4000), -np.inf, np.float32)
    logits[0, [5, 100, 3999]] = np.log([3.0, 1.0, 4.0])
    for kind in ({}, {"top_k": 3}, {"top_p": 0.9999}, {"min_p": 1e-3}):
        params = SamplingParams(temperature=1.0, **kind)
        uniform = (np.arange(16) + 0.5) / 16
        found = choose(np.repeat(logits, 16, 0), [params] * 16, uniform)
        assert found == [5] * 6 + [100] * 2 + [3999] * 8
        ends = choose(np.repeat(logits, 2, 0), [params] * 2, np.array([0.0, 1 - 2.0**-53]))
        assert ends == [5, 3999]


@pytest.mark.parametrize("min_p", [0.9, 0.3, 0.05, 1e-4])
def test_what_min_p_just_keeps_is_listed(min_p: float) -> None:
    """Of the logits around its end, one representable number after another, the last that the host keeps can come."""
    params, logits = SamplingParams(temperature=1.7, min_p=min_p), np.full((1, MIDDLE), -50, np.float32)
    peak = logits[0, 5] = np.float32(11.3)
    end = np.float32(peak + 1.7 * np.log(min_p))
    around = end.view(np.int32) + np.arange(-40, 40)[::-1].astype(np.int32)
    logits[0, 4000:4080] = around.view(np.float32)
    rows = np.repeat(logits, 2, 0)
    assert 0 < (choices(logits[0], params)[0] >= 4000).sum() < 80
    compare(rows, [params] * 2, np.array([1 - 2.0**-53, 0.999999]))


def test_many_ties_with_the_last() -> None:
    """More than are listed: all of them can come."""
    logits = np.zeros((8, MIDDLE), np.float32)
    logits[:, 7] = 1
    params = SamplingParams(temperature=1.0, top_k=2)
    compare(logits, [params] * 8, np.linspace(0, 1, 8, endpoint=False))


def test_the_largest_may_all_stand_in_one_group() -> None:
    """Then the k-th largest of the groups says little; and few ids are allowed in all."""
    rng = np.random.default_rng(0)
    logits = np.zeros((2, MIDDLE), np.float32)
    logits[:, 64:96] = rng.permutation(32).astype(np.float32) + 5
    allowed = np.zeros(MIDDLE, bool)
    allowed[[70, 71, 4000]] = True
    for kind in ({"top_k": 30}, {"top_p": 0.95}, {"top_k": 30, "top_p": 0.9}):
        compare(logits, [SamplingParams(temperature=4.0, **kind)] * 2, np.array([0.7, 0.3]), allowed)


@pytest.mark.parametrize("kind", [{}, *KINDS[1:3], {"temperature": 1.0, "top_p": 0.5}], ids=str)
def test_rows_without_a_finite_largest_logit_give_nothing(kind: dict[str, Any]) -> None:
    logits = np.zeros((5, 100), np.float32)
    logits[0, 3], logits[1, 40], logits[2] = np.nan, np.inf, -np.inf
    logits[3, 50] = -np.nan
    found = choose(logits, [SamplingParams(**kind)] * 5, np.full(5, 0.5))
    assert found[1:] == [-1] * 4
    assert found[0] >= 0
    nothing = choose(logits[4:].repeat(2, 0), [SamplingParams(**kind)] * 2, np.full(2, 0.5), np.zeros(100, bool))
    assert nothing[0] >= 0
    assert nothing[1] == -1


def test_ids_beyond_a_mask_are_not_allowed() -> None:
    logits = np.zeros((2, 100), np.float32)
    logits[:, 90] = 5
    assert choose(logits, [SamplingParams()] * 2, np.zeros(2), np.arange(64) == 33) == [90, 33]


def test_many_rows_are_worked_on_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_kernels, "MOST_ROWS", 4)  # slices stay aligned
    rng = np.random.default_rng(1)
    logits = rng.standard_normal((10, 333)).astype(np.float32)
    compare(logits, [SamplingParams(temperature=1.0, top_k=5)] * 10, rng.random(10), rng.random(333) < 0.5)
    rows, tokens = torch.arange(10), torch.arange(10) + 7
    found = KernelWork().measure(torch.from_numpy(logits), rows, tokens, 4)
    assert found.logit.tolist() == logits[np.arange(10), np.arange(10) + 7].tolist()
    assert (found.ids.sort(1).values.numpy() == np.sort(np.argsort(-logits, 1)[:, :4], 1)).all()


@given(st.data(), st.sampled_from([5, 37, 100]), st.integers(0, 7))
def test_what_logprobs_need(data: st.DataObject, vocab: int, count: int) -> None:
    """Sums, the token's logit and the largest logits; of ties those with the lowest ids, by rising id."""
    pool = np.array(data.draw(st.lists(LOGIT, min_size=2, max_size=9)), np.float32)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    logits = rng.choice(pool, (2, vocab))
    logits[:, data.draw(st.integers(0, vocab - 1))] = 0.5  # without a finite number there are no logprobs
    measure(logits, count, [data.draw(st.integers(0, vocab - 1)), -1])


@pytest.mark.parametrize(("vocab", "count"), [(MIDDLE, 20), (MIDDLE, 400), (REAL, 5)])
def test_what_logprobs_need_of_long_rows(vocab: int, count: int) -> None:
    """Also where more are asked for than there are groups."""
    logits = np.random.default_rng(0).standard_normal((2, vocab)).astype(np.float32)
    measure(logits, count, [3, vocab - 1])
    measure(np.round(logits), count, [3, vocab - 1])


def measure(logits: np.ndarray, count: int, tokens: list[int]) -> None:
    found = KernelWork().measure(torch.from_numpy(logits), torch.tensor([1, 0]), torch.tensor(tokens), count)
    for place, token in enumerate(tokens):
        row = logits[1 - place]
        assert found.peak[place] == row.max()
        wide = np.exp(row.astype(np.float64) - row.max())
        assert float(found.total[place]) == pytest.approx(wide.sum(), rel=1e-6)
        if token >= 0:
            assert found.logit[place] == row[token]
        largest = np.sort(np.argsort(-row, kind="stable")[:count])
        assert found.ids[place].tolist() == largest.tolist()
        assert found.values[place].tolist() == row[largest].tolist()


@given(st.data(), st.sampled_from([0, 1, 3, 9]))
def test_penalties_are_the_hosts(data: st.DataObject, ahead: int) -> None:
    """Bit for bit, histories of different lengths, with proposals that are counted otherwise; other rows stay."""
    vocab, rng = data.draw(st.sampled_from([60, 900])), np.random.default_rng(data.draw(st.integers(0, 999)))
    sizes = data.draw(st.lists(st.integers(0, vocab * 2 // 3), min_size=1, max_size=3))  # of several programs, too
    logits = (rng.standard_normal((len(sizes) + 1, vocab)) * 4).astype(np.float32)
    wanted = logits.copy()
    entries, begins, all_penalties, ids, counts = [], [], [], [], []
    for place, size in enumerate(sizes):
        history = History(rng.integers(0, vocab, size), rng.integers(0, vocab, size // 2))
        begins.append(sum(len(each) for each in entries))
        entries.append(np.stack([history.ids, history.counts], 1).astype(np.int32))
        row_penalties = [data.draw(st.sampled_from(each)) for each in ([1.0, 1.7, 0.8], [0.0, 0.25], [0.0, -1.0])]
        all_penalties.append(row_penalties)
        proposed = np.where(rng.random(ahead) < 0.3, -1, rng.choice(vocab, ahead, replace=False))  # −1: fewer proposals
        for token in proposed[proposed >= 0]:
            history.add(int(token))
        ids.append(proposed)
        counts.append([history.count(int(token)) if token >= 0 else 9 for token in proposed])
        names = ("repetition_penalty", "frequency_penalty", "presence_penalty")
        params = SamplingParams(**dict(zip(names, row_penalties, strict=True)))
        adjust(wanted[len(sizes) - place], params, params.bias.ids, params.bias.values_f32, history)
    there = torch.from_numpy(logits)
    seen = SeenRows(
        rows=torch.arange(len(sizes), 0, -1),
        begins=torch.tensor(begins),
        sizes=torch.tensor([len(each) for each in entries]),
        penalties=torch.tensor(all_penalties, dtype=torch.float32),
        table=torch.from_numpy(np.concatenate([*entries, np.zeros((1, 2), np.int32)])),
        widest=max(len(each) for each in entries),
        ahead_ids=torch.from_numpy(np.array(ids, np.int32)) if ahead else None,
        ahead_counts=torch.from_numpy(np.array(counts, np.float32)) if ahead else None,
    )
    KernelWork().penalize(there, seen)
    assert np.array_equal(there.numpy(), wanted)


def test_all_that_steps_launch_is_made_ready() -> None:
    """After `prepare` no request waits for a kernel, with masks and proposals and without."""
    work, rng = KernelWork(), np.random.default_rng(0)
    work.prepare(100, torch.device("cpu"))
    ready = set(work._launches)
    logits, rows = torch.from_numpy(rng.standard_normal((3, 100)).astype(np.float32)), torch.arange(3)
    rules, uniform = torch.tensor([[1.0, 5, 0.9, 0]] * 3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    penalties, table = torch.ones((3, 3)), torch.zeros((9, 2), dtype=torch.int32)
    for masks in ((None, None), (torch.zeros(3, dtype=torch.int32), torch.full((1, 4), -1, dtype=torch.int32))):
        work.choose(logits, Draws(rows, rules, uniform, *masks))
    work.measure(logits, rows, rows, 9)
    for ahead in (0, 1, 5, 8):
        listed = (torch.zeros((3, ahead), dtype=torch.int32), torch.zeros((3, ahead))) if ahead else (None, None)
        work.penalize(logits, SeenRows(rows, rows, rows, penalties, table, 3, *listed))
    assert set(work._launches) == ready


@pytest.mark.parametrize("error", [RuntimeError("Failed to find C compiler.\nmore"), OSError("no space"), KeyError()])
def test_what_triton_lacks_is_told_when_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """What is no fault of the machine stays what it is."""

    def fail(self: Launch, *arguments: Any) -> None:
        raise error

    monkeypatch.setattr(Launch, "__call__", fail)
    wanted = LookupError if isinstance(error, LookupError) else AngelForgeError
    with pytest.raises(wanted, match=r"^$|choose tokens: (Failed to find C compiler|no space)\. It needs a C compiler"):
        KernelWork().prepare(100, torch.device("cpu"))


def test_a_lack_of_memory_is_no_fault_of_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Launch, *arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(Launch, "__call__", fail)
    with pytest.raises(AngelForgeError, match=r"no memory left for a step: CUDA out of memory\. .*--kv-memory-gb"):
        KernelWork().prepare(100, torch.device("cpu"))


def test_requests_are_served_as_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of different rules at once, with logprobs, where the logits are torch's."""
    monkeypatch.setattr(device_sampling, "work_of", lambda device: KernelWork())
    params = [
        SamplingParams(max_tokens=5, temperature=0.8, top_k=5, seed=1, repetition_penalty=1.3, logit_bias={3: 2.0}),
        SamplingParams(max_tokens=5, temperature=1.0, top_p=0.9, seed=2, logprobs=2),
        SamplingParams(max_tokens=5, frequency_penalty=0.4),
    ]
    found = []
    for where in (torch.from_numpy, lambda logits: logits):
        engine = PagedEngine(4, 64, 64, 37)
        forward = engine.forward
        monkeypatch.setattr(engine, "forward", lambda batch, where=where, forward=forward: where(forward(batch)))
        found.append(LLM.from_engine(engine).generate([[5, 6, 7], [8], [9] * 4], params))
    for one, other in zip(*found, strict=True):
        assert (one.token_ids, one.error) == (other.token_ids, None)
    told, wanted = ([(each.token, each.top[0][0]) for each in outputs[1].logprobs] for outputs in found)
    assert told == wanted
