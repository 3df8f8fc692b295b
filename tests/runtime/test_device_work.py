"""What a device computes keeps to its contract, beyond what the sampler asks of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.device_works import EVERY_WORK

from angelforge.runtime import device_sampling
from angelforge.runtime.device_adjusting import Place
from angelforge.runtime.device_sampling import DeviceSampler
from angelforge.runtime.device_torch import TorchWork
from angelforge.runtime.device_work import Draws, SeenRows, Work, work_of
from angelforge.runtime.distribution import adjust
from angelforge.runtime.history import Seen
from angelforge.runtime.sampling import SamplingParams

VOCAB = 45
DEVICE = "cuda:0" if torch.cuda.is_available() else "cpu"
PENALTY = st.tuples(
    st.sampled_from([1.0, 1.05, 0.5]), st.sampled_from([0.0, 0.3, -1.0]), st.sampled_from([0.0, 0.25, -0.5])
)
COUNTED = st.dictionaries(st.integers(0, VOCAB - 1), st.integers(0, 5), max_size=9)


def there(values: Any, kind: torch.dtype) -> torch.Tensor:
    return torch.tensor(np.array(values), dtype=kind, device=DEVICE)


@EVERY_WORK
@given(
    each=st.lists(st.tuples(PENALTY, COUNTED, COUNTED), min_size=1, max_size=4),
    ahead=st.booleans(),
    seed=st.integers(0, 99),
)
def test_penalties_are_the_hosts(work: Work, each: list[Any], ahead: bool, seed: int) -> None:
    """Of histories of any size, also none, that lie apart among others; rows that are not named stay as they are."""
    rng = np.random.default_rng(seed)
    logits = np.round(rng.standard_normal((len(each) + 2, VOCAB)) * 8).astype(np.float32) / 4
    rows = rng.permutation(len(logits))[: len(each)]
    room, width = 11, max(1, *(len(more) for *_, more in each))
    table = rng.integers(0, VOCAB, (room * (len(each) + 1), 2))  # what lies behind a history's end is some other's
    ids, counts = np.full((len(each), width), -1), np.zeros((len(each), width))
    wanted, begins = logits.copy(), rng.permutation(len(each)) * room + rng.integers(0, 2)
    for place, (row, (penalties, seen, more)) in enumerate(zip(rows, each, strict=True)):
        for at, pair in enumerate(seen.items()):
            table[begins[place] + at] = pair
        if ahead:
            columns = rng.permutation(width)[: len(more)]  # nothing may lie between
            ids[place, columns], counts[place, columns] = list(more), list(more.values())
        params = SamplingParams(**dict(zip(NAMES, penalties, strict=True)))
        known = seen | more if ahead else seen
        history = Seen(np.array(list(known), np.int64), np.array(list(known.values()), np.float32))
        adjust(wanted[row], params, np.empty(0, np.int64), np.empty(0, np.float32), history)
    x = there(logits, torch.float32)
    known_rows = SeenRows(
        there(rows, torch.int64),
        there(begins, torch.int64),
        there([len(seen) for _, seen, _ in each], torch.int64),
        there([penalties for penalties, *_ in each], torch.float32),
        there(table, torch.int32),
        max(len(seen) for _, seen, _ in each),
        there(ids, torch.int32) if ahead else None,
        there(counts, torch.float32) if ahead else None,
    )
    work.penalize(x, known_rows)
    np.testing.assert_allclose(x.cpu().numpy(), wanted, rtol=1e-6, atol=1e-6)


NAMES = ("repetition_penalty", "frequency_penalty", "presence_penalty")


@EVERY_WORK
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_masks_of_any_width(work: Work, temperature: float) -> None:
    """Ids beyond a mask are not allowed, and bits beyond the vocabulary mean nothing."""
    logits = there(np.arange(VOCAB)[None].repeat(3, 0), torch.float32)
    rows, rules = there([2, 0, 1], torch.int64), there([[temperature, 1, 1, 0]] * 3, torch.float64)
    uniform, mask_of = there([0.9] * 3, torch.float64), there([1, -1, 0], torch.int32)
    for width, most in ((1, 31), (2, VOCAB - 1), (3, VOCAB - 1)):
        words = np.full((2, width), -1, np.int32)
        words[0, 1:] = 0
        chosen = work.choose(logits, Draws(rows, rules, uniform, mask_of, there(words, torch.int32)))
        assert chosen.tolist() == [most, VOCAB - 1, 31]


@EVERY_WORK
@given(data=st.data(), count=st.integers(0, 20))
def test_what_is_measured(work: Work, data: st.DataObject, count: int) -> None:
    """Of some rows in any order: against NumPy in f64, of ties the lowest ids."""
    values = st.lists(st.integers(-9, 9).map(float) | st.just(-torch.inf), min_size=VOCAB, max_size=VOCAB)
    logits = np.array(data.draw(st.lists(values, min_size=1, max_size=4)), np.float32)
    logits[:, 7] = 3
    rows = data.draw(st.permutations(range(len(logits))))
    tokens = data.draw(st.lists(st.integers(-1, VOCAB - 1), min_size=len(rows), max_size=len(rows)))
    found = work.measure(there(logits, torch.float32), there(rows, torch.int64), there(tokens, torch.int64), count)
    chosen = logits[rows]
    assert found.peak.tolist() == chosen.max(1).tolist()
    total = np.exp(chosen.astype(np.float64) - chosen.max(1, keepdims=True)).sum(1)
    np.testing.assert_allclose(found.total.cpu().numpy(), total, rtol=1e-6)
    kinds = [found.peak.dtype, found.total.dtype, found.logit.dtype, found.values.dtype, found.ids.dtype]
    assert kinds == [torch.float32, torch.float64, torch.float32, torch.float32, torch.int32]
    for place, (row, token) in enumerate(zip(chosen, tokens, strict=True)):
        assert token < 0 or found.logit[place] == row[token]
        best = np.argsort(-row, kind="stable")[:count].tolist()
        assert sorted(found.ids[place].tolist()) == sorted(best)
        assert found.values[place].tolist() == row[found.ids[place].tolist()].tolist()


def test_a_cpu_computes_in_torch() -> None:
    assert isinstance(work_of(torch.device("cpu")), TorchWork)


def test_what_is_launched_goes_to_the_samplers_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the thread's current GPU, which is the first one in a thread that says nothing."""
    inside: list[torch.device] = []

    @contextmanager
    def bound_to(device: torch.device) -> Iterator[None]:
        inside.append(device)
        yield
        inside.pop()

    class Noting(TorchWork):
        def choose(self, logits: torch.Tensor, draws: Draws) -> torch.Tensor:
            seen.append(list(inside))
            return super().choose(logits, draws)

    seen: list[list[torch.device]] = []
    monkeypatch.setattr(device_sampling, "bound_to", bound_to)
    sampler, place = (
        DeviceSampler(torch.device("cpu"), Noting()),
        Place(0, SamplingParams(), None, np.random.default_rng(0)),
    )
    assert sampler.answer(torch.eye(3), [place]).tokens.tolist() == [0]
    assert seen == [[torch.device("cpu")]]
