"""A step's choices on a device: one copy there, one copy back, and nothing else that a host would wait for."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.device_works import EVERY_WORK
from support.drawing import drawing
from support.far_device import FAR, Watch, far, watched
from support.paged_engine import PagedEngine
from support.stub_draft import StubDraft, noisy

from angelforge import LLM, SamplingParams
from angelforge.runtime import device_history
from angelforge.runtime.device_adjusting import Place, places_of
from angelforge.runtime.device_history import DeviceHistories
from angelforge.runtime.device_round import Scored
from angelforge.runtime.device_sampling import DeviceSampler
from angelforge.runtime.device_transfer import Packed, Parcel
from angelforge.runtime.device_work import Work
from angelforge.runtime.history import History
from angelforge.runtime.logprobs import row_logprob

VOCAB = 37
ALL = {
    "temperature": 0.8,
    "repetition_penalty": 1.2,
    "frequency_penalty": 0.3,
    "presence_penalty": 0.2,
    "logit_bias": {3: 1.5},
    "min_p": 0.01,
    "top_p": 0.95,
    "seed": 3,
}
KINDS: dict[str, list[dict[str, Any]]] = {
    "greedy": [{}, {}, {}],
    "greedy with logprobs": [{"logprobs": 2}, {}, {"logprobs": 0}],
    "all rules": [ALL | {"top_k": 5}] * 3,
    "all rules with logprobs": [ALL | {"top_k": 5, "logprobs": 3}, ALL | {"top_k": 4}, {"repetition_penalty": 1.3}],
    "the whole vocabulary": [{"temperature": 1.0, "seed": 1}, {"temperature": 0.7, "seed": 2, "logprobs": 1}],
    "top-p alone": [{"temperature": 1.0, "seed": 1, "top_p": 0.9}],
    "prompts": [{"prompt_logprobs": 2}, {"prompt_logprobs": 0, "logprobs": 4}, {}],
    "a mixture": [{}, ALL | {"top_k": 5}, {"temperature": 1.0, "seed": 1, "logprobs": 1}, {"prompt_logprobs": 1}],
}
PROMPTS = [[5, 6, 7], [8], [9] * 5, [1, 2]]


def load(depth: int, where: Any) -> tuple[LLM, PagedEngine]:
    engine = PagedEngine(4, 64, 64, VOCAB)
    draft = StubDraft(engine, noisy(engine), where=where)
    forward = engine.forward
    engine.forward = lambda batch: where(forward(batch))
    return LLM.from_engine(engine, draft=draft, speculate=depth), engine


@pytest.mark.parametrize("depth", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_fetches_once_and_waits_for_nothing_else(kind: str, depth: int) -> None:
    """With a draft's proposals to verify and without; the outputs are those of logits on the host.

    With a draft only those of greedy requests are: others draw their numbers otherwise on a device, see
    `test_speculative_sampling.py` for their distribution.
    """
    params = [SamplingParams(max_tokens=9, **one) for one in KINDS[kind]]
    with watched() as watch:
        llm, engine = load(depth, lambda logits: far(torch.from_numpy(logits)))
        found = llm.generate(PROMPTS[: len(params)], params)
    assert watch.waits == []
    assert watch.fetches == len(engine.batches)
    assert watch.sends <= len(engine.batches)
    assert [one.error for one in found] == [None] * len(found)
    if depth:
        assert llm.speculation is not None
        assert llm.speculation.rounds > 0
    wanted = load(depth, lambda logits: logits)[0].generate(PROMPTS[: len(params)], params)
    for one, other, asked, prompt in zip(found, wanted, params, PROMPTS, strict=False):
        text = [*prompt, *one.token_ids]
        assert len(text) == len(prompt) + 9
        if not depth or asked.greedy:
            assert one.token_ids == other.token_ids
        for name in ("logprobs", "prompt_logprobs"):
            assert (getattr(one, name) is None) == (getattr(other, name) is None)
        for name, first, count in (
            ("logprobs", len(prompt), asked.logprobs),
            ("prompt_logprobs", 0, asked.prompt_logprobs),
        ):
            for at, told in enumerate(getattr(one, name) or (), first):
                if told is not None:
                    that = row_logprob(engine.dense_logits(np.array(text[:at])), text[at], count)
                    assert told.token == that.token
                    assert told.logprob == pytest.approx(that.logprob, abs=1e-5)
                    assert [place for place, _ in told.top] == [place for place, _ in that.top]


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 1.0},
        {"temperature": 0.7, "frequency_penalty": 0.5, "logit_bias": {3: 1.0}},
        {"temperature": 1.0, "logprobs": 5, "top_k": 15_000},
        {"repetition_penalty": 1.05, "logprobs": 5},
        {"temperature": 1.0, "top_p": 0.999},
    ],
)
def test_what_a_step_fetches_does_not_grow_with_the_vocabulary(params: dict[str, Any]) -> None:
    """Of 32 requests with three proposals each, at most 10 kB come back; their rows have 10 MB."""
    rows = torch.from_numpy(np.random.default_rng(0).standard_normal((128, 20_000)).astype(np.float32))
    places = []
    for number in range(32):
        request = drawing(SamplingParams(**params), [1, 2, 3], [3], np.random.default_rng(number))
        places += places_of(4 * number, request, [4, 5, 6])
    with watched() as watch:
        answer = DeviceSampler(FAR).answer(far(rows), places)
    assert (answer.tokens >= 0).all()
    assert watch.fetched_bytes <= 10_000
    assert (watch.sends, watch.fetches, watch.waits) == (1, 1, [])


WAITING = {
    "a number is read": lambda x: float(x[0, 0]),
    "a list of indices": lambda x: x[[0, 1]],
    "a mask": lambda x: x[x > 0],
    "places that hold": lambda x: (x > 0).nonzero(),
    "a condition": lambda x: bool((x > 0).all()),
    "an array that is sent without staging": lambda x: x + torch.ones(4).to(FAR),
}


@pytest.mark.parametrize("what", WAITING)
def test_what_waits_is_seen(what: str) -> None:
    """What the test above would miss if the device that it uses did not tell."""
    with watched() as watch:
        WAITING[what](far(torch.arange(12.0).view(3, 4)))
    assert watch.waits


def test_copies_are_counted() -> None:
    with watched() as watch:
        packed, parcel = Packed(FAR), Parcel()
        packed.add("a", np.arange(3, dtype=np.int32))
        packed.add("b", np.array([[0.5], [1.5]]))
        packed.send()
        parcel.add("a", packed["a"] + 1)
        parcel.add("b", packed["b"] * 2)
        found = parcel.fetch()
    assert [found[name].tolist() for name in "ab"] == [[1, 2, 3], [[1.0], [3.0]]]
    assert (watch.sends, watch.fetches, watch.launches, watch.waits) == (1, 1, 3, [])


def test_what_is_sent_begins_where_kernels_read_at_full_width() -> None:
    packed = Packed(torch.device("cpu"))
    for number in range(1, 6):
        packed.add(f"{number}", np.ones(number, np.int32))
        packed.add(f"{number}, {number}", np.ones((number, number)))
    packed.send()
    begins = {packed[name].data_ptr() - packed["1"].data_ptr() for name in packed._sent}
    assert len(begins) == 10
    assert all(begin % 16 == 0 for begin in begins)


def test_only_what_is_new_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of a request with a long prompt sends its last token, whatever came before."""
    sent: list[int] = []
    send = Packed.send

    def counted(self: Packed) -> None:
        sent.append(self.nbytes)
        send(self)

    monkeypatch.setattr(Packed, "send", counted)
    engine = PagedEngine(64, 64, 2048, 3000)
    forward = engine.forward
    engine.forward = lambda batch: torch.from_numpy(forward(batch))
    prompt = np.random.default_rng(0).permutation(3000)[:1500].tolist()
    params = SamplingParams(max_tokens=12, temperature=0.6, top_k=20, top_p=0.95, repetition_penalty=1.05, seed=0)
    (output,) = LLM.from_engine(engine, max_tokens_per_step=2048).generate([prompt], params)
    assert len(output.token_ids) == len(sent) == 12
    assert sent[0] > 1500 * 8
    assert max(sent[1:]) < 100


@pytest.mark.parametrize(("params", "sends"), [({}, 1), ({"logit_bias": {3: 1.0}}, 1), ({"temperature": 1.0}, 3)])
def test_requests_that_ask_for_the_same_again_are_not_sent_again(params: dict[str, Any], sends: int) -> None:
    """Of three steps the first alone sends the rules; a number for each token has to go there."""
    places = places_of(0, drawing(SamplingParams(**params)), [])
    with watched() as watch:
        sampler = DeviceSampler(FAR)
        for _ in range(3):
            sampler.answer(far(torch.zeros(1, VOCAB)), places)
    assert (watch.sends, watch.fetches) == (sends, 3)


IDS = st.integers(0, 20)


@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.sampled_from(["new", "end", "add", "add", "add", "propose"]), IDS), max_size=40
    )
)
def test_the_device_knows_what_histories_hold(events: list[tuple[int, str, int]]) -> None:
    """Histories come, grow, try proposals and go; those that a step asks about are as on the host."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_history, "_LEAST_LINES", 1)
        patch.setattr(device_history, "_LEAST_ROOM", 2)
        known, histories = DeviceHistories(torch.device("cpu")), {}
        for key, what, token in events:
            if what == "new":
                histories[key] = History(np.arange(token))
            elif what == "end":
                histories.pop(key, None)
            elif key in histories:
                histories[key].add(token)
                if what == "propose":
                    histories[key].add(token + 1)
                    histories[key].take_back(token + 1)
            asked = [history for number, history in histories.items() if number != key]
            if asked:
                compare(known, asked)
            assert known.lines <= len(histories)
        histories.clear()
        asked = []
        assert known.lines == 0


def compare(known: DeviceHistories, asked: list[History]) -> None:
    packed = Packed(torch.device("cpu"))
    begins = known.pack(packed, asked)
    packed.send()
    known.update(packed)
    for begin, history in zip(begins.tolist(), asked, strict=True):
        ids, counts = known.table[begin : begin + history.size].unbind(1)
        assert ids.tolist() == history.ids.tolist()
        assert counts.tolist() == history.counts.tolist()


def test_another_sampler_is_told_everything() -> None:
    history = History(np.arange(5))
    first, second = DeviceHistories(torch.device("cpu")), DeviceHistories(torch.device("cpu"))
    for known in (first, second, first):
        history.add(3)
        compare(known, [history])


def test_a_watch_refuses_what_a_gpu_would() -> None:
    with watched(), pytest.raises(AssertionError, match="mixes devices"):
        far(torch.ones(3)) + torch.ones(3)
    with pytest.raises(AssertionError, match="within `watched`"):
        far(torch.ones(3)) + 1
    assert Watch().launches == 0


@EVERY_WORK
def test_logprobs_of_many_rows(work: Work) -> None:
    """More than are measured at once, of places of every kind, and of prompts: those of the raw logits on the host."""
    rng = np.random.default_rng(3)
    kinds = [{}, {"temperature": 1.0, "top_k": 4}, {"temperature": 1.0}, {"repetition_penalty": 1.3}]
    logits = rng.standard_normal((210, VOCAB)).astype(np.float32)
    places = []
    for row in range(150):
        params = SamplingParams(logprobs=row % 3, seed=row, **kinds[row % 4])
        history = History(rng.integers(0, VOCAB, 5)) if params.penalizes else None
        places.append(Place(row, params, history, np.random.default_rng(row), logprobs=row % 3))
    scored = [Scored(row, row % VOCAB, 2) for row in range(150, 210)]
    answer = DeviceSampler(torch.device("cpu"), work).answer(torch.tensor(logits), places, scored)
    asked = [(place.row, int(token), place.row % 3) for place, token in zip(places, answer.tokens, strict=True)]
    for row, token, count in [*asked, *((each.row, each.token, each.count) for each in scored)]:
        found, wanted = answer.logprob(row, token, count), row_logprob(logits[row], token, count)
        assert (found.token, [place for place, _ in found.top]) == (token, [place for place, _ in wanted.top])
        assert found.logprob == pytest.approx(wanted.logprob, abs=1e-5)


FOLLOWING = {
    "a bias": ({"logit_bias": {3: 50.0}}, {"logit_bias": {4: 50.0}}),
    "penalties": (
        {"repetition_penalty": 1.1, "logit_bias": {0: 0.5}},
        {"repetition_penalty": 9.0, "frequency_penalty": 2.0, "logit_bias": {0: 0.5}},
    ),
    "a temperature": ({"temperature": 1e-6, "top_k": 20}, {"temperature": 1e6, "top_k": 20}),
    "a top-k": ({"temperature": 50.0, "top_k": 20}, {"temperature": 50.0, "top_k": 1}),
    "a top-p": ({"temperature": 50.0, "top_p": 0.99}, {"temperature": 50.0, "top_p": 1e-6}),
}


def two_steps(sampler: DeviceSampler, rules: dict[str, Any]) -> list[list[int]]:
    """A new request's tokens in four rows, twice."""
    rows = np.random.default_rng(5).standard_normal((4, VOCAB)).astype(np.float32)
    rows[:, [7, 9]] = 6, 5
    request = drawing(SamplingParams(**rules), [7], [7, 7], np.random.default_rng(0))
    places = [Place.of(row, request) for row in range(4)]
    return [sampler.answer(torch.tensor(rows), places).tokens.tolist() for _ in range(2)]


@pytest.mark.parametrize("kind", FOLLOWING)
@EVERY_WORK
def test_the_next_request_in_a_row_has_its_own_rules(work: Work, kind: str) -> None:
    """Nothing of the one that had the row before is left, in whichever order they come: tokens of a fresh sampler."""
    wanted = [two_steps(DeviceSampler(torch.device("cpu"), work), rules) for rules in FOLLOWING[kind]]
    assert wanted[0] != wanted[1]
    kept = DeviceSampler(torch.device("cpu"), work)
    assert [two_steps(kept, FOLLOWING[kind][turn]) for turn in (0, 1, 0)] == [wanted[0], wanted[1], wanted[0]]


def test_lines_stay_apart_when_histories_outgrow_their_room() -> None:
    """Two grow past 1,024 different ids: each is read where it is then, by the same two requests in the same rows."""
    known, rng = DeviceHistories(torch.device("cpu")), np.random.default_rng(0)
    histories = [History(rng.permutation(3000)[:1000]) for _ in range(2)]
    for token in rng.integers(0, 3000, 120).tolist():
        for shift, history in enumerate(histories):
            history.add((token + shift) % 3000)
        compare(known, histories)
    assert all(history.size > 1024 for history in histories)
