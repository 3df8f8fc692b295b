"""What is drawn where the logits lie has the distribution of the host's sampler: on a GPU if there is one."""

from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.far_device import far, watched

from angelforge.runtime import device_distribution, device_largest, device_round
from angelforge.runtime.device_adjusting import Place, Standing, adjusted_rows, pack_adjustments, places_of
from angelforge.runtime.device_distribution import draw_rows, kept_weights
from angelforge.runtime.device_history import DeviceHistories
from angelforge.runtime.device_largest import RowRules, candidates_of, is_narrow, largest_of
from angelforge.runtime.device_round import pack_rules, rules_of
from angelforge.runtime.device_sampling import DeviceSampler
from angelforge.runtime.device_transfer import Packed
from angelforge.runtime.distribution import adjusted, processed_distribution
from angelforge.runtime.history import History
from angelforge.runtime.proposals import Proposer
from angelforge.runtime.sampler import sample
from angelforge.runtime.sampling import SamplingParams

REAL = 157_184  # ids of the real model
DEVICE = "cuda:0" if torch.cuda.is_available() else "cpu"


@dataclass
class Allowing:
    """A constraint that allows some ids."""

    bits: np.ndarray

    def mask(self) -> np.ndarray:
        return self.bits

    def accept(self, token: int) -> None:
        """Nothing changes."""


@dataclass
class Asking:
    """What a sampler needs of a request."""

    params: SamplingParams
    history: History | None = None
    constraint: Allowing | None = None
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))


def asking(prompt: list[int] = (), output: list[int] = (), allowed: np.ndarray | None = None, **params: Any) -> Asking:
    history = History(np.array(prompt, np.int64), np.array(output, np.int64))
    constraint = None
    if allowed is not None:
        octets = np.packbits(allowed, bitorder="little")
        constraint = Allowing(np.pad(octets, (0, -len(octets) % 4)).view(np.uint32))
    return Asking(SamplingParams(**params), history, constraint)


def there(logits: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(logits).to(DEVICE)


def places(requests: list[Asking]) -> list[Place]:
    return [Place.of(row, request) for row, request in enumerate(requests)]


def sample_on_device(logits: torch.Tensor, requests: list[Asking]) -> np.ndarray:
    return DeviceSampler(logits.device).answer(logits, places(requests)).tokens


def adjusted_on_device(logits: torch.Tensor, chosen: list[Place]) -> torch.Tensor:
    packed, histories = Packed(logits.device), DeviceHistories(logits.device)
    pack_adjustments(packed, Standing(logits.shape, chosen), chosen, logits.shape[1], histories)
    packed.send()
    return adjusted_rows(logits, packed, histories)


def on_device(logits: np.ndarray, requests: list[Asking]) -> tuple[np.ndarray, np.ndarray]:
    """Adjusted logits and probabilities of all rows, from the whole vocabulary."""
    x, packed = adjusted_on_device(there(logits), places(requests)), Packed(torch.device(DEVICE))
    pack_rules(packed, places(requests), x.shape[1])
    packed.send()
    rules = rules_of(packed, [request.params for request in requests], x.shape[1])
    weights = kept_weights(x, x.argmax(1, keepdim=True), rules).double()
    return x.cpu().numpy(), (weights / weights.sum(1, keepdim=True)).cpu().numpy()


def from_largest(logits: np.ndarray, requests: list[Asking]) -> dict[int, np.ndarray]:
    """Probabilities of the rows for which the largest logits tell them."""
    narrow = [row for row, request in enumerate(requests) if is_narrow(request.params, logits.shape[1])]
    if not narrow:
        return {}
    x = adjusted_on_device(there(logits), [Place.of(row, requests[row]) for row in narrow])
    rules = RowRules.of([requests[row].params for row in narrow], x.shape[1])
    found = candidates_of(largest_of(x, rules, there(rules.divisors)).cpu().numpy(), rules)
    dense = np.zeros((len(narrow), logits.shape[1]))
    for row, ids, weights in zip(dense, found.ids, found.weights, strict=True):
        row[ids] = weights / weights.sum()
    return {row: dense[i] for i, row in enumerate(narrow) if found.decided[i]}


def compare(logits: np.ndarray, requests: list[Asking]) -> None:
    before = logits.copy()
    x, found = on_device(logits, requests)
    few = from_largest(logits, requests)
    assert np.array_equal(logits, before)
    for row, request in enumerate(requests):
        params, mask = request.params, request.constraint and request.constraint.mask()
        assert np.array_equal(x[row], adjusted(logits[row], params, request.history, mask))
        expected = processed_distribution(logits[row], params, request.history, mask)
        for each in (found[row], few.get(row, found[row])):
            assert np.array_equal(each > 0, expected > 0), params
            np.testing.assert_allclose(each, expected, rtol=1e-5, atol=1e-9)


VOCAB = 37
IDS = st.integers(0, VOCAB - 1)
# A grid makes ties common.
LOGIT = st.one_of(st.integers(-12, 12).map(lambda n: n / 4), st.just(-0.0), st.floats(-30, 30, width=32))


@st.composite
def requests_of(draw: st.DrawFn) -> Asking:
    allowed = draw(st.none() | st.lists(st.booleans(), min_size=VOCAB, max_size=VOCAB).filter(any))
    return asking(
        draw(st.lists(IDS, max_size=5)),
        draw(st.lists(IDS, max_size=5)),
        None if allowed is None else np.array(allowed),
        temperature=draw(st.sampled_from([0.25, 0.7, 1.0, 1.9])),
        top_k=draw(st.sampled_from([0, 0, 1, 2, 5, 20, 36, 37, 50])),
        top_p=draw(st.sampled_from([1.0, 0.99, 0.9, 0.61, 0.3, 0.01])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.03, 0.4])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.05, 1.7, 0.8])),
        presence_penalty=draw(st.sampled_from([0.0, 0.5, -1.0])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.25])),
        logit_bias=draw(st.dictionaries(IDS, st.integers(-8, 8).map(lambda n: n / 2), max_size=3)),
    )


@given(data=st.data(), requests=st.lists(requests_of(), min_size=1, max_size=4), most=st.sampled_from([4, 1024]))
def test_the_distribution_is_the_hosts(data: st.DataObject, requests: list[Asking], most: int) -> None:
    """Every rule, in any mixture of rows, with many ties; `most`: also where the k largest are not sorted."""
    rows = st.lists(LOGIT, min_size=VOCAB, max_size=VOCAB)
    logits = np.array([data.draw(rows) for _ in requests], np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_distribution, "MOST_SORTED", most)
        patch.setattr(device_largest, "MOST", most)
        patch.setattr(device_largest, "_TIES", 2)
        compare(logits, requests)


@pytest.mark.parametrize(
    "params",
    [
        {"top_k": 20, "top_p": 0.95},
        {"top_p": 0.9},
        {"top_p": 0.999, "temperature": 1.5},
        {"top_k": 3000, "top_p": 0.99},
    ],
    ids=str,
)
def test_the_distribution_is_the_hosts_over_the_real_vocabulary(params: dict[str, Any]) -> None:
    rng = np.random.default_rng(7)
    logits = (rng.standard_normal((2, REAL)) * 3).astype(np.float32)
    logits[:, rng.integers(0, REAL, 300)] += 9
    history = rng.integers(0, REAL, 500).tolist()
    one = {"temperature": 0.6, "repetition_penalty": 1.05} | params
    compare(logits, [asking(history, history[:100], **one), asking(history, **one | {"top_k": 7})])


def test_ties_are_broken_by_the_lower_id() -> None:
    """Greedy takes the first of the largest; of equal tokens the nucleus keeps those with the lowest ids."""
    logits = np.zeros((2, 1000), np.float32)
    logits[0, [700, 31, 800]] = 5
    assert sample_on_device(there(logits), [asking(), asking()]).tolist() == [31, 0]
    _, found = on_device(logits, [asking(temperature=1.0, top_p=0.1), asking(temperature=1.0, top_p=0.1)])
    assert np.flatnonzero(found[1]).tolist() == list(range(100))


def test_shares_of_draws() -> None:
    """Numbers spread evenly over [0, 1) give every token its share, and none to tokens without weight."""
    weights = torch.tensor([0.0, 3.0, 0.0, 1.0, 4.0, 0.0], device=DEVICE)
    count = 800
    uniform = ((torch.arange(count, dtype=torch.float64, device=DEVICE) + 0.5) / count).unsqueeze(1)
    ids = draw_rows(weights.repeat(count, 1), torch.full((count, 1), 4, device=DEVICE), uniform).squeeze(1)
    assert torch.bincount(ids, minlength=6).tolist() == [0, 300, 0, 100, 400, 0]
    ends = torch.tensor([[0.0], [1 - 2.0**-53]], dtype=torch.float64, device=DEVICE)
    assert draw_rows(weights.repeat(2, 1), torch.full((2, 1), 4, device=DEVICE), ends).flatten().tolist() == [1, 4]


def test_a_token_depends_on_its_own_request_alone() -> None:
    """Alone or among others, with a seed: the same tokens again."""
    logits = torch.randn(6, 500, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    kinds: list[dict[str, Any]] = [
        {"temperature": 1.0},
        {},
        {"temperature": 0.8, "top_k": 9},
        {"temperature": 0.8, "top_p": 0.7},
        {"repetition_penalty": 1.4},
        {"temperature": 1.2, "min_p": 0.02, "logit_bias": {3: 4.0}},
    ]

    def requests() -> list[Asking]:
        return [asking([1, 2, 3], **kind) for kind in kinds]

    together = sample_on_device(logits, requests())
    alone = [sample_on_device(logits[row : row + 1], [request])[0] for row, request in enumerate(requests())]
    assert together.tolist() == alone
    backwards = sample_on_device(logits.flip(0), requests()[::-1])
    assert backwards[::-1].tolist() == alone


@given(data=st.data(), requests=st.lists(requests_of(), min_size=1, max_size=4), most=st.sampled_from([4, 1024]))
def test_tokens_with_a_top_k_are_the_hosts(data: st.DataObject, requests: list[Asking], most: int) -> None:
    """With the numbers that the requests' generators give; those from the whole vocabulary are allowed ones."""
    rows = st.lists(LOGIT, min_size=VOCAB, max_size=VOCAB)
    logits = np.array([data.draw(rows) for _ in requests], np.float32)
    expected = sample(logits, [replace(request, rng=np.random.default_rng(5)) for request in requests])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_largest, "MOST", most)
        patch.setattr(device_largest, "_TIES", 2)
        fresh = [replace(request, rng=np.random.default_rng(5)) for request in requests]
        found = sample_on_device(there(logits), fresh)
        told = from_largest(logits, requests)
    for row, request in enumerate(requests):
        if row in told and 0 < request.params.top_k < VOCAB:
            assert found[row] == expected[row]
        else:
            mask = request.constraint and request.constraint.mask()
            allowed = processed_distribution(logits[row], request.params, request.history, mask)
            assert allowed[found[row]] > 0


@given(
    data=st.data(),
    request=requests_of(),
    beside=st.lists(requests_of(), min_size=1, max_size=3),
    most=st.sampled_from([4, 20]),
)
def test_a_token_does_not_depend_on_the_rows_beside_it(
    data: st.DataObject, request: Asking, beside: list[Asking], most: int
) -> None:
    """Rows beside it have more logits looked at, or are drawn otherwise; ties are common."""
    rows = st.lists(LOGIT, min_size=VOCAB, max_size=VOCAB)
    logits = np.array([data.draw(rows) for _ in range(len(beside) + 1)], np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_largest, "MOST", most)
        patch.setattr(device_largest, "_TIES", 2)
        alone = sample_on_device(there(logits[:1]), [replace(request, rng=np.random.default_rng(5))])
        requests = [replace(each, rng=np.random.default_rng(5)) for each in (request, *beside)]
        assert sample_on_device(there(logits), requests)[0] == alone[0]


def test_many_rows_are_drawn_from_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens are those of all rows at once."""
    logits = torch.randn(7, 100, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    kinds: list[dict[str, Any]] = [{"temperature": 1.0}, {"temperature": 3.0, "top_k": 60}, {"temperature": 9.0}]
    found = []
    for rows in (64, 3):
        monkeypatch.setattr(device_round, "_ROWS", rows)
        monkeypatch.setattr(device_largest, "MOST", 50)
        fresh = [replace(asking(**kinds[row % 3]), rng=np.random.default_rng(row)) for row in range(7)]
        found.append(sample_on_device(logits, fresh).tolist())
    assert found[0] == found[1]
    assert len(set(found[0])) > 2


def test_rows_without_a_finite_largest_logit_give_nothing() -> None:
    logits = torch.zeros(4, 10, device=DEVICE)
    logits[0, 3], logits[1, 4], logits[2] = torch.nan, torch.inf, -torch.inf
    for params in ({}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3, "top_p": 0.5}, {"logit_bias": {1: 1.0}}):
        found = sample_on_device(logits, [asking(**params) for _ in range(4)])
        assert found[:3].tolist() == [-1, -1, -1], params
        assert found[3] >= 0
    nothing = asking(temperature=1.0, allowed=np.zeros(10, bool))
    assert sample_on_device(logits[3:], [nothing]).tolist() == [-1]


@given(data=st.data(), request=requests_of(), proposed=st.lists(IDS, max_size=3))
def test_a_chain_is_drawn_from_as_on_the_host(data: st.DataObject, request: Asking, proposed: list[int]) -> None:
    """At each place of a chain of proposals, which count as output there, and leave the history as it was."""
    request.constraint = None
    rows = st.lists(LOGIT, min_size=VOCAB, max_size=VOCAB)
    logits = np.array([data.draw(rows) for _ in range(len(proposed) + 2)], np.float32)
    before = [request.history.ids.copy(), request.history.counts.copy()]
    chosen = places_of(1, request, proposed)
    x = adjusted_on_device(there(logits), chosen)
    tokens = DeviceSampler(x.device).answer(there(logits), chosen).tokens
    assert [a.tolist() for a in (request.history.ids, request.history.counts)] == [a.tolist() for a in before]
    for place, token in enumerate(tokens):
        assert np.array_equal(x[place].cpu(), adjusted(logits[1 + place], request.params, request.history))
        assert processed_distribution(logits[1 + place], request.params, request.history)[token] > 0
        if place < len(proposed):
            request.history.add(proposed[place])


def test_many_ties_with_the_last_candidate() -> None:
    """More than are looked at on the device: they are drawn from there, and nothing is lost."""
    logits = torch.zeros(2, 500, device=DEVICE)
    logits[0, 7] = 1
    sampler, rng = DeviceSampler(logits.device), np.random.default_rng(0)
    place = asking(temperature=1.0, top_k=2)
    place.rng = rng
    found = np.array([sampler.answer(logits, places_of(0, place, [3])).tokens for _ in range(300)])
    assert min(len(np.unique(column)) for column in found.T) > 100
    assert found.max() > 450


@given(st.lists(st.lists(LOGIT, min_size=VOCAB, max_size=VOCAB), min_size=1, max_size=4))
def test_greedy_picks_are_the_hosts(rows: list[list[float]]) -> None:
    """Plain ones and those with penalties."""
    logits = np.array(rows, np.float32)
    for params in ({}, {"repetition_penalty": 1.3, "logit_bias": {5: 1.0}}):
        requests = [asking([1, 2, 5], [5], **params) for _ in rows]
        assert sample_on_device(there(logits), requests).tolist() == sample(logits, requests).tolist()


def test_a_draft_on_a_device_proposes_its_likeliest_tokens() -> None:
    """Whatever is asked for; nothing of its logits comes to the host."""
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_k": 4},
        {"repetition_penalty": 2},
    ]
    asked = [(asking([1, 2], [3], **kind), [7, 8]) for kind in kinds]
    with watched() as watch:
        logits = far(torch.randn(4, 25))
        draft = SimpleNamespace(vocabulary=np.arange(3, 28), logits=lambda: logits)
        found = Proposer(draft).choose_all(np.array([9, 8, 7, 6, 5]), asked)
    assert found == [(9, None), (8, None), (7, None), (6, None)]
    assert watch.fetches == 0
    assert asked[3][0].history.counts.sum() == 1
