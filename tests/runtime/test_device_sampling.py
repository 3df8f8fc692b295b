"""What is drawn where the logits lie is what the host's sampler draws: on a GPU if there is one."""

from dataclasses import dataclass, field, replace
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.device_works import EVERY_WORK
from support.far_device import far, watched

from angelforge.runtime import device_torch
from angelforge.runtime.device_adjusting import Place, Standing, adjust, places_of
from angelforge.runtime.device_history import DeviceHistories
from angelforge.runtime.device_sampling import DeviceSampler
from angelforge.runtime.device_torch import TorchWork
from angelforge.runtime.device_transfer import Packed
from angelforge.runtime.device_work import Draws, Work
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
class Fixed:
    """A generator that gives one number."""

    value: float

    def random(self) -> float:
        return self.value


@dataclass
class Asking:
    """What a sampler needs of a request."""

    params: SamplingParams
    history: History | None = None
    constraint: Allowing | None = None
    rng: Any = field(default_factory=lambda: np.random.default_rng(0))


def asking(prompt: list[int] = (), output: list[int] = (), allowed: np.ndarray | None = None, **params: Any) -> Asking:
    history = History(np.array(prompt, np.int64), np.array(output, np.int64))
    constraint = None
    if allowed is not None:
        octets = np.packbits(allowed, bitorder="little")
        constraint = Allowing(np.pad(octets, (0, -len(octets) % 4)).view(np.uint32))
    return Asking(SamplingParams(**params), history, constraint)


def there(logits: np.ndarray) -> torch.Tensor:
    """A copy, which may change."""
    return torch.tensor(logits, device=DEVICE)


def places(requests: list[Asking]) -> list[Place]:
    return [Place.of(row, request) for row, request in enumerate(requests)]


def sample_on_device(work: Work, logits: np.ndarray, requests: list[Asking]) -> np.ndarray:
    return DeviceSampler(torch.device(DEVICE), work).answer(there(logits), places(requests)).tokens


def adjusted_on_device(work: Work, logits: np.ndarray, chosen: list[Place]) -> np.ndarray:
    packed, histories = Packed(torch.device(DEVICE)), DeviceHistories(torch.device(DEVICE))
    widest = Standing(logits.shape[1], chosen).pack(packed, chosen, histories)
    packed.send()
    return adjust(there(logits), packed, histories, work, widest).cpu().numpy()


def certain_token(logits: np.ndarray, request: Asking, uniform: float, margin: float = 1e-5) -> int | None:
    """What the host draws with a number; None where another would come if sums were rounded otherwise."""
    params, found = request.params, set()
    for high, nucleus, floor in product((-margin, margin), repeat=3):
        nudged = replace(
            params,
            top_p=params.top_p if params.top_p == 1 else min(params.top_p * (1 + nucleus), 1.0),
            min_p=min(params.min_p * (1 + floor), 1.0),
        )
        point = Fixed(min(max(uniform + high, 0.0), 1 - 2.0**-53))
        found.add(int(sample(logits[None], [replace(request, params=nudged, rng=point)])[0]))
    return found.pop() if len(found) == 1 else None


VOCAB = 37
IDS = st.integers(0, VOCAB - 1)
# A grid makes ties common.
LOGIT = st.one_of(st.integers(-12, 12).map(lambda n: n / 4), st.just(-0.0), st.floats(-30, 30, width=32))
ROW = st.lists(LOGIT, min_size=VOCAB, max_size=VOCAB)
ALLOWED = st.none() | st.lists(st.booleans(), min_size=VOCAB, max_size=VOCAB).filter(any)
RULES: dict[str, Any] = {
    "temperature": st.sampled_from([0.0, 0.25, 0.7, 1.0, 1.9]),
    "top_k": st.sampled_from([0, 0, 1, 2, 5, 20, 36, 37, 50]),
    "top_p": st.sampled_from([1.0, 0.99, 0.9, 0.61, 0.3, 0.01]),
    "min_p": st.sampled_from([0.0, 0.0, 0.03, 0.4, 1.0]),
}
CHANGES: dict[str, Any] = {
    "repetition_penalty": st.sampled_from([1.0, 1.05, 1.7, 0.8]),
    "presence_penalty": st.sampled_from([0.0, 0.5, -1.0]),
    "frequency_penalty": st.sampled_from([0.0, 0.25]),
    "logit_bias": st.dictionaries(IDS, st.integers(-8, 8).map(lambda n: n / 2), max_size=3),
}


@st.composite
def requests_of(draw: st.DrawFn, **rules: Any) -> Asking:
    allowed = draw(ALLOWED)
    seen = [draw(st.lists(IDS, max_size=5)) for _ in range(2)]
    asked = draw(st.fixed_dictionaries(rules or RULES | CHANGES))
    return asking(*seen, None if allowed is None else np.array(allowed), **asked)


def logits_of(data: st.DataObject, rows: int) -> np.ndarray:
    return np.array([data.draw(ROW) for _ in range(rows)], np.float32)


@EVERY_WORK
@given(data=st.data(), requests=st.lists(requests_of(), min_size=1, max_size=4), seed=st.integers(0, 9))
def test_tokens_are_the_hosts(work: Work, data: st.DataObject, requests: list[Asking], seed: int) -> None:
    """With every rule, in any mixture of rows, with many ties, from the numbers that the same generators give."""
    logits = logits_of(data, len(requests))
    before = logits.copy()
    fresh = [replace(request, rng=np.random.default_rng(seed)) for request in requests]
    found = sample_on_device(work, logits, fresh)
    uniform = np.random.default_rng(seed).random()
    for row, request in enumerate(requests):
        wanted = certain_token(logits[row], request, uniform)
        assert wanted is None or found[row] == wanted
        assert fresh[row].rng.random() == (uniform if request.params.greedy else following(seed))
    assert np.array_equal(logits, before)


def following(seed: int) -> float:
    """The second number of a generator: one was taken."""
    return float(np.random.default_rng(seed).random(2)[1])


@EVERY_WORK
@given(data=st.data(), requests=st.lists(requests_of(**RULES), min_size=1, max_size=4), seed=st.integers(0, 2**32))
def test_tokens_of_exact_weights_are_the_hosts(
    work: Work, data: st.DataObject, requests: list[Asking], seed: int
) -> None:
    """Weights are 1 or 0, so that no sum is rounded: every tie and every edge is decided as on the host."""
    values = st.lists(st.sampled_from([0.0, 0.0, -0.0, -300.0, -torch.inf]), min_size=VOCAB, max_size=VOCAB)
    logits = np.array([data.draw(values) for _ in requests], np.float32)
    logits[:, data.draw(IDS)] = 0
    fresh = [[replace(each, rng=np.random.default_rng(seed)) for each in requests] for _ in range(2)]
    assert sample_on_device(work, logits, fresh[0]).tolist() == sample(logits, fresh[1]).tolist()


@EVERY_WORK
@given(data=st.data(), requests=st.lists(requests_of(), min_size=1, max_size=4))
def test_bias_and_penalties_are_the_hosts(work: Work, data: st.DataObject, requests: list[Asking]) -> None:
    """In every row, whatever the others ask for."""
    logits = logits_of(data, len(requests))
    x = adjusted_on_device(work, logits, places(requests))
    wanted = [adjusted(row, each.params, each.history) for row, each in zip(logits, requests, strict=True)]
    np.testing.assert_allclose(x, wanted, rtol=1e-6, atol=4e-6)


@EVERY_WORK
@pytest.mark.parametrize("told", [(None, None), (0, None), (None, 0)])
def test_logits_change_in_place_unless_their_logprobs_are_asked_for(work: Work, told: tuple[int | None, ...]) -> None:
    """The rows of those that ask for it are copied, the whole round's; a round that changes nothing copies nothing."""
    logits = np.random.default_rng(0).standard_normal((2, VOCAB)).astype(np.float32)
    penalized = asking([3], [3], presence_penalty=1.0, logprobs=told[0])
    biased = asking(logit_bias={5: 2.0}, logprobs=told[1])
    x = there(logits)
    DeviceSampler(x.device, work).answer(x, [Place.of(1, penalized), Place.of(0, biased)])
    changed = logits.copy()
    if told == (None, None):
        changed[1, 3] -= 1
        changed[0, 5] += 2
    assert np.array_equal(x.cpu().numpy(), changed)


@EVERY_WORK
@pytest.mark.parametrize(
    "params",
    [
        {"top_k": 20, "top_p": 0.95},
        {"top_p": 0.9},
        {"top_p": 0.999, "temperature": 1.5},
        {"top_k": 3000, "top_p": 0.99},
        {"min_p": 0.01},
        {"temperature": 1.0},
    ],
    ids=str,
)
def test_tokens_are_the_hosts_over_the_real_vocabulary(work: Work, params: dict[str, Any]) -> None:
    rng = np.random.default_rng(7)
    logits = (rng.standard_normal((3, REAL)) * 3).astype(np.float32)
    logits[:, rng.integers(0, REAL, 300)] += 9
    history = rng.integers(0, REAL, 500).tolist()
    one = {"temperature": 0.6, "repetition_penalty": 1.05} | params
    requests = [asking(history, history[:100], **one | more) for more in ({}, {"top_k": 7}, {"seed": 1})]
    fresh = [replace(request, rng=np.random.default_rng(row)) for row, request in enumerate(requests)]
    wanted = [
        certain_token(logits[row], request, np.random.default_rng(row).random(), 1e-7)
        for row, request in enumerate(requests)
    ]
    assert None not in wanted
    assert sample_on_device(work, logits, fresh).tolist() == wanted


@EVERY_WORK
def test_ties_are_broken_by_the_lower_id(work: Work) -> None:
    """Greedy takes the first of the largest; of equal tokens the nucleus keeps those with the lowest ids."""
    logits = np.zeros((2, 1000), np.float32)
    logits[0, [700, 31, 800]] = 5
    assert sample_on_device(work, logits, [asking(), asking()]).tolist() == [31, 0]
    assert np.flatnonzero(shares(work, logits[1], [1.0, 0, 0.03, 0], 60)).tolist() == list(range(30))


def shares(work: Work, row: np.ndarray, rules: list[float], count: int) -> np.ndarray:
    """How often each token comes, of one row and numbers spread evenly over [0, 1)."""
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5).to(DEVICE) / count
    rows = torch.zeros(count, dtype=torch.int64, device=DEVICE)
    ruled = torch.tensor([rules], dtype=torch.float64, device=DEVICE).repeat(count, 1)
    ids = work.choose(there(row[None]), Draws(rows, ruled, uniform))
    return np.bincount(ids.cpu().numpy(), minlength=row.shape[0])


@EVERY_WORK
def test_shares_of_draws(work: Work) -> None:
    """Every token gets its share, and those without weight none, at the edges neither."""
    weights = np.array([0, 3, 0, 1, 4, 0], np.float64)
    with np.errstate(divide="ignore"):
        row = np.log(weights).astype(np.float32)
    assert shares(work, row, [1.0, 0, 1.0, 0], 80).tolist() == [0, 30, 0, 10, 40, 0]
    requests = [Asking(SamplingParams(temperature=1.0), rng=Fixed(value)) for value in (0.0, 1 - 2.0**-53)]
    assert sample_on_device(work, np.stack([row, row]), requests).tolist() == [1, 4]


@EVERY_WORK
@given(data=st.data(), request=requests_of(), beside=st.lists(requests_of(), min_size=1, max_size=3))
def test_a_token_does_not_depend_on_the_rows_beside_it(
    work: Work, data: st.DataObject, request: Asking, beside: list[Asking]
) -> None:
    """Alone or among others, and in whichever order: the same token, with many ties."""
    logits = logits_of(data, len(beside) + 1)
    alone = sample_on_device(work, logits[:1], [replace(request, rng=np.random.default_rng(5))])
    for order in (1, -1):
        requests = [replace(each, rng=np.random.default_rng(5)) for each in (request, *beside)][::order]
        assert sample_on_device(work, logits[::order].copy(), requests)[::order][0] == alone[0]


def test_many_rows_are_chosen_from_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens are those of all rows at once."""
    logits = np.random.default_rng(0).standard_normal((7, 100)).astype(np.float32)
    allowed = [None, np.arange(100) % 2 == 0, np.arange(100) % 3 == 0]
    kinds: list[dict[str, Any]] = [{"temperature": 1.0}, {"temperature": 3.0, "top_k": 60}, {"temperature": 9.0}]
    found = []
    for rows in (64, 3):
        monkeypatch.setattr(device_torch, "_ROWS", rows)
        requests = [asking(allowed=allowed[row // 3], **kinds[row % 3]) for row in range(7)]
        fresh = [replace(request, rng=np.random.default_rng(row)) for row, request in enumerate(requests)]
        found.append(sample_on_device(TorchWork(), logits, fresh).tolist())
    assert found[0] == found[1]
    assert len(set(found[0])) > 2


@EVERY_WORK
def test_rows_without_a_finite_largest_logit_give_nothing(work: Work) -> None:
    logits = np.zeros((4, 10), np.float32)
    logits[0, 3], logits[1, 4], logits[2] = np.nan, np.inf, -np.inf
    for params in ({}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3, "top_p": 0.5}, {"logit_bias": {1: 1.0}}):
        found = sample_on_device(work, logits, [asking(**params) for _ in range(4)])
        assert found[:3].tolist() == [-1, -1, -1], params
        assert found[3] >= 0
    nothing = asking(temperature=1.0, allowed=np.zeros(10, bool))
    assert sample_on_device(work, logits[3:], [nothing]).tolist() == [-1]


@EVERY_WORK
@given(data=st.data(), request=requests_of(), proposed=st.lists(IDS, max_size=3), seed=st.integers(0, 9))
def test_a_chain_is_drawn_from_as_on_the_host(
    work: Work, data: st.DataObject, request: Asking, proposed: list[int], seed: int
) -> None:
    """At each place of a chain of proposals, which count as output there, and leave the history as it was."""
    request.constraint = None
    logits = logits_of(data, len(proposed) + 2)
    before = [request.history.ids.copy(), request.history.counts.copy()]
    chosen = places_of(1, replace(request, rng=np.random.default_rng(seed)), proposed)
    x = adjusted_on_device(work, logits, [replace(each, rng=Fixed(0.5), logprobs=None) for each in chosen])
    tokens = DeviceSampler(torch.device(DEVICE), work).answer(there(logits), chosen).tokens
    assert [a.tolist() for a in (request.history.ids, request.history.counts)] == [a.tolist() for a in before]
    assert np.array_equal(x[0], logits[0])
    for place, (token, uniform) in enumerate(zip(tokens, np.random.default_rng(seed).random(9), strict=False)):
        host = adjusted(logits[1 + place], request.params, request.history)
        np.testing.assert_allclose(x[1 + place], host, rtol=1e-6, atol=4e-6)
        wanted = certain_token(logits[1 + place], request, uniform)
        assert wanted is None or token == wanted
        if place < len(proposed):
            request.history.add(proposed[place])


@EVERY_WORK
def test_a_token_that_is_proposed_twice_counts_twice(work: Work) -> None:
    request = asking([4], [4], frequency_penalty=0.5, presence_penalty=0.25)
    x = adjusted_on_device(work, np.zeros((4, VOCAB), np.float32), places_of(0, request, [4, 9, 4]))
    assert x[:, 4].tolist() == [-0.75, -1.25, -1.25, -1.75]
    assert x[:, 9].tolist() == [0, 0, -0.75, -0.75]


@EVERY_WORK
def test_a_grammar_holds_for_the_next_request_with_the_same_rules(work: Work) -> None:
    logits, free = np.zeros((1, VOCAB), np.float32), asking()
    bound = replace(free, constraint=asking(allowed=np.arange(VOCAB) == 30).constraint)
    sampler = DeviceSampler(torch.device(DEVICE), work)
    found = [sampler.answer(there(logits), places([one])).tokens.tolist() for one in (free, bound, free)]
    assert found == [[0], [30], [0]]


@EVERY_WORK
def test_many_ties_with_the_last_candidate(work: Work) -> None:
    """All of them may come, however many there are."""
    row = np.zeros(60, np.float32)
    row[7] = 1
    found = shares(work, row, [1.0, 2, 1.0, 0], 120)
    wanted = 120 * processed_distribution(row, SamplingParams(temperature=1.0, top_k=2))
    assert np.abs(found - wanted).max() <= 1
    assert found.min() > 0


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
