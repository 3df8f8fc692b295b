"""Sampled speculation has the target's distribution under every sampling option: chi-square tests with fixed seeds."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.drawing import drawing
from support.paged_engine import PagedEngine
from support.stub_draft import StubDraft, noisy, perfect, wrong

from angelforge import LLM, SamplingParams
from angelforge.runtime import choosing, device_adjusting
from angelforge.runtime.distribution import candidates, processed_distribution
from angelforge.runtime.history import History
from angelforge.runtime.proposals import Proposer
from angelforge.runtime.sampler import draw
from angelforge.runtime.speculation import Speculator
from angelforge.runtime.verification import Shares, judge

OPTIONS = {
    "temperature 1": SamplingParams(temperature=1.0),
    "cold": SamplingParams(temperature=0.4),
    "top-k": SamplingParams(temperature=1.2, top_k=3),
    "top-p": SamplingParams(temperature=1.0, top_p=0.8),
    "min-p": SamplingParams(temperature=1.5, min_p=0.2),
    "penalty": SamplingParams(temperature=1.0, repetition_penalty=1.6),
    "presence, frequency": SamplingParams(temperature=1.0, presence_penalty=0.8, frequency_penalty=0.6),
    "bias": SamplingParams(temperature=1.0, logit_bias={1: 1.5, 2: -2.0, 3: 0.5}),
    "all": SamplingParams(
        temperature=0.9,
        top_k=5,
        top_p=0.95,
        min_p=0.02,
        repetition_penalty=1.2,
        presence_penalty=0.3,
        frequency_penalty=0.4,
        logit_bias={1: 0.5},
    ),
}
EVERY = pytest.mark.parametrize("params", OPTIONS.values(), ids=OPTIONS)


def excess(counts, probabilities):
    """Pearson's statistic in standard deviations above its mean; cells that are expected too rarely are put together.

    An outcome that cannot happen is infinitely far off.
    """
    counts, expected = np.asarray(counts, float), np.asarray(probabilities) * np.sum(counts)
    if counts[expected == 0].any():
        return np.inf
    rare = expected < 8
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = len(counts) - 1
    if freedom == 0:
        return 0.0
    return (((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom)


VOCAB = 8
PROMPTED, SAID = [1, 4], [4, 6]
HISTORY = History(np.array(PROMPTED), np.array(SAID))


def one_token(params, draft_logits, rule=judge, count=20000):
    """How often each token comes out of `rule` when the draft proposes by `draft_logits`; and the target's shares."""
    rng = np.random.default_rng(7)
    logits = np.random.default_rng(1).standard_normal(VOCAB).astype(np.float32) * 2
    request = drawing(params, PROMPTED, SAID, rng)
    shares = Shares(*candidates(draft_logits, params, HISTORY))
    counts = np.zeros(VOCAB)
    for _ in range(count):
        counts[rule(logits, request, draw(shares.ids, shares.probabilities, rng), shares)] += 1
    return counts, processed_distribution(logits, params, HISTORY)


def draft_logits(kind):
    """The target's logits, others, and others of which half can never be proposed."""
    target, other = (np.random.default_rng(seed).standard_normal(VOCAB).astype(np.float32) * 2 for seed in (1, 2))
    return {"same": target, "other": other, "few": np.where(np.arange(VOCAB) % 2, other, np.float32(-60))}[kind]


@EVERY
@pytest.mark.parametrize("kind", ["same", "other", "few"])
def test_one_token_has_the_targets_distribution(params, kind):
    counts, wanted = one_token(params, draft_logits(kind), count=4000)
    assert excess(counts, wanted) < 4


def test_a_proposal_drawn_greedily_keeps_the_distribution():
    """Without shares the whole probability of the proposal lies on it."""
    params, counts = OPTIONS["temperature 1"], np.zeros(VOCAB)
    logits = np.random.default_rng(1).standard_normal(VOCAB).astype(np.float32) * 2
    request = drawing(params, PROMPTED, SAID, np.random.default_rng(0))
    for _ in range(6000):
        counts[judge(logits, request, 3, None)] += 1
    assert excess(counts, processed_distribution(logits, params, HISTORY)) < 4


def test_wrong_rules_are_seen():
    """The test finds the usual mistakes: to accept always, to draw anew from p, to compare unprocessed shares."""
    params = OPTIONS["temperature 1"]

    def always(logits, request, proposal, shares):
        return proposal

    def from_p_again(logits, request, proposal, shares):
        ids, p = candidates(logits, request.params, request.history)
        accepted = request.rng.random() * shares.of(np.array([proposal]))[0] < p[ids == proposal].sum()
        return proposal if accepted else draw(ids, p, request.rng)

    for rule in (always, from_p_again):
        assert excess(*one_token(params, draft_logits("other"), rule, count=4000)) > 8
    counts, _ = one_token(OPTIONS["top-k"], draft_logits("other"), count=4000)
    _, unprocessed = one_token(params, draft_logits("other"), count=1)
    assert excess(counts, unprocessed) > 8


WORDS, LENGTH, PROMPT, SEEDS = 3, 4, (2, 0), 1200


class FlatEngine(PagedEngine):
    """All of its outputs are likely: a distribution over few of them would show no mistake."""

    def __init__(self):
        super().__init__(4, 256, 32, WORDS)
        self.head = self.head / 25


def exact(params):
    """Probability of every output of LENGTH tokens by the target alone."""
    model, found = FlatEngine(), {}
    for output in itertools.product(range(WORDS), repeat=LENGTH):
        known, probability = list(PROMPT), 1.0
        for token in output:
            logits = model.dense_logits(np.array(known))
            history = History(np.array(PROMPT), np.array(known[len(PROMPT) :], np.int64))
            probability *= processed_distribution(logits, params, history)[token]
            known.append(token)
        found[output] = probability
    return found


def whole_outputs(name, draft, depth, vocabulary=None, where=lambda logits: logits):
    """(counts of every output of batches of 32, their probabilities, what the draft did)"""
    engine, params = FlatEngine(), OPTIONS[name]
    proposing = StubDraft(engine, draft(engine), vocabulary, where=where)
    forward = engine.forward
    engine.forward = lambda batch: where(forward(batch))
    llm = LLM.from_engine(engine, draft=proposing, speculate=depth)
    fixed = {"max_tokens": LENGTH, "ignore_eos": True}
    asked = [SamplingParams(**{**vars(params), **fixed, "seed": seed}) for seed in range(SEEDS)]
    wanted = exact(params)
    counts = dict.fromkeys(wanted, 0)
    for output in llm.generate([list(PROMPT)] * len(asked), asked):
        counts[output.token_ids] += 1
    return np.array(list(counts.values())), np.array(list(wanted.values())), llm.speculation


@pytest.mark.parametrize(
    ("draft", "depth", "vocabulary"),
    [(noisy, 2, None), (wrong, 3, [0, 2]), (perfect, 3, None), (noisy, "auto", [0, 2])],
    ids=["noisy", "wrong, gaps", "perfect", "auto, gaps"],
)
@pytest.mark.parametrize("name", ["temperature 1", "penalty", "all"])
def test_whole_outputs_have_the_targets_distribution(name, draft, depth, vocabulary):
    """Every output of four tokens comes as often as the target alone would give it; chains have up to three places."""
    counts, wanted, report = whole_outputs(name, draft, depth, vocabulary)
    assert -(wanted[wanted > 0] * np.log(wanted[wanted > 0])).sum() > 1  # nats
    assert (wanted * SEEDS >= 8).sum() >= 10
    assert report.rounds > 500
    assert min(report.acceptance_by_position[:2]) > 0
    assert excess(counts, wanted) < 4


@pytest.mark.parametrize(
    ("name", "draft", "depth", "vocabulary"),
    [
        ("temperature 1", noisy, 2, None),
        ("temperature 1", wrong, 3, [0, 2]),
        ("penalty", perfect, 3, None),
        ("top-p", noisy, 3, None),
        ("all", noisy, "auto", [0, 2]),
    ],
)
def test_on_a_device_too(name, draft, depth, vocabulary):
    """There a likeliest token is proposed, and passes where it is drawn."""
    counts, wanted, report = whole_outputs(name, draft, depth, vocabulary, torch.from_numpy)
    assert (wanted * SEEDS >= 8).sum() >= 10
    assert report.rounds > 500
    assert report.acceptance_by_position[0] > 0
    assert excess(counts, wanted) < 4


def test_a_wrong_run_on_a_device_is_seen(monkeypatch):
    """Proposals that are not counted where they stand before a token."""
    places_of = device_adjusting.places_of
    monkeypatch.setattr(
        device_adjusting,
        "places_of",
        lambda first, request, proposed: [replace(each, ahead=()) for each in places_of(first, request, proposed)],
    )
    assert excess(*whole_outputs("presence, frequency", perfect, 3, None, torch.from_numpy)[:2]) > 8


def test_wrong_runs_are_seen(monkeypatch):
    """The test above finds shares of another place, a likeliest last token, proposals that all pass."""
    with monkeypatch.context() as patch:
        patch.setattr(Speculator, "shares", lambda self, request, place: self._drafted[request].shares[0])
        assert excess(*whole_outputs("temperature 1", noisy, 2)[:2]) > 8
    with monkeypatch.context() as patch:
        patch.setattr(choosing, "sample", lambda logits, requests: logits.argmax(axis=1))
        assert excess(*whole_outputs("temperature 1", noisy, 2)[:2]) > 8
    with monkeypatch.context() as patch:
        patch.setattr(choosing, "judge", lambda logits, request, proposal, shares: proposal)
        assert excess(*whole_outputs("temperature 1", noisy, 2)[:2]) > 8


def test_the_penalty_counts_the_chain():
    """What stands in the chain already is penalised at its next place, as it is in the target's distribution."""
    engine = FlatEngine()
    draft = StubDraft(engine, perfect(engine))
    draft.last_logits = np.array([[1.0, 0.9, -5.0]], np.float32)
    request = drawing(
        SamplingParams(temperature=0.0, frequency_penalty=1.0), PROMPTED[:0], [], np.random.default_rng(0)
    )
    proposer, first = Proposer(draft), np.zeros(1, np.int64)
    assert proposer.choose_all(first, [(request, [])])[0][0] == 0
    assert proposer.choose_all(first, [(request, [0])])[0][0] == 1
    assert proposer.choose_all(first, [(request, [0, 1])])[0][0] == 0
    assert proposer.choose_all(first, [(request, [])])[0][0] == 0  # the chain was not noted for good
