"""Speculation changes nothing but the number of calls, whatever the draft says; on tiny engines in NumPy."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.drawing import drawing
from support.paged_engine import PagedEngine
from support.serving import CONTEXT, DRAFTS, VOCAB, Serving, alone, limits_of
from support.stub_draft import StubDraft, noisy, perfect, wrong
from support.tokenizers import byte_level

from angelforge import LLM, SamplingParams
from angelforge.errors import AngelForgeError, UsageError
from angelforge.runtime.distribution import candidates
from angelforge.runtime.history import History
from angelforge.runtime.proposals import Proposer

PARAMS = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 25),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    ignore_eos=st.booleans(),
)
ASKED = st.tuples(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=CONTEXT), PARAMS)
VOCABULARIES = st.sampled_from([None, list(range(VOCAB)), [2, 3, 5, 7, 11, 13, 17, 19]])
DEPTHS = st.sampled_from([0, 1, 2, 3, 5, 8, "auto"])


def check_a_schedule(limits, plans, draft, vocabulary, depth):
    """Runs the plans; outputs are those of requests alone, caches and pages are in order after every step."""
    serving = Serving(limits, draft, vocabulary, depth)
    plans = sorted(plans, key=lambda plan: plan[1])
    for step in itertools.count():
        for asked, arrival in plans:
            if arrival == step:
                serving.add(*asked)
        if not serving.step() and step > 12:
            break
    assert serving.pool.free == serving.pool.capacity
    for request, (asked, _) in zip(serving.requests, plans, strict=True):
        output, wanted = request.outbox[-1].output, alone(*asked)
        assert (output.token_ids, output.finish_reason) == (wanted.token_ids, wanted.finish_reason)
    serving.check_sizes()
    return serving


@settings(max_examples=30)
@given(
    limits_of(8),
    st.lists(st.tuples(ASKED, st.integers(0, 12)), min_size=1, max_size=6),
    st.sampled_from(sorted(DRAFTS)),
    VOCABULARIES,
    DEPTHS,
)
def test_greedy_outputs_are_those_of_plain_decoding(limits, plans, draft, vocabulary, depth):
    """For any prompts, arrivals, batch, page and step sizes, drafts, their vocabularies and depths; 400 prompts."""
    check_a_schedule(limits, plans, draft, vocabulary, depth)


def load(guess, depth, max_context=200, eos=(), tokenizer=None, vocab=VOCAB, **options):
    engine = PagedEngine(4, 256, max_context, vocab, eos)
    draft = StubDraft(engine, guess(engine))
    return LLM.from_engine(engine, tokenizer, draft=draft, speculate=depth, **options), engine, draft


def test_a_perfect_draft_saves_all_the_calls_it_can():
    """One call for the prompt, then depth + 1 tokens a call; each call of the target has one of the draft behind it."""
    llm, engine, draft = load(perfect, 4)
    (output,) = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=1 + 5 * 6))
    assert len(engine.batches) == 1 + 6
    report = output.speculation
    assert (report.target_calls, report.rounds, report.proposed, report.accepted) == (7, 6, 24, 24)
    assert (report.accepted_length, report.acceptance_by_position) == (5.0, (1.0,) * 4)
    assert draft.calls[:5] == [(3, 1), (1, 1), (1, 1), (1, 1), (5, 1)]  # the prompt, its chain, what was accepted
    assert len(draft.calls) == 6 * 4  # nothing after the end


def test_a_wrong_draft_costs_no_calls_of_the_target():
    llm, engine, _ = load(wrong, 3)
    (output,) = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=20))
    assert len(engine.batches) == 20
    report = output.speculation
    assert (report.rounds, report.accepted, report.accepted_length) == (19 - 1, 0, 1.0)
    assert report.acceptance_by_position == (0.0, 0.0, 0.0)


def test_one_verification_call_serves_the_whole_batch_and_prompts_of_others():
    llm, engine, draft = load(perfect, 3, max_batch=4)
    params = [SamplingParams(max_tokens=n) for n in (13, 9, 13, 13, 5)]
    outputs = llm.generate([[2] * 5, [3] * 2, [4] * 9, [5], [6] * 7], params)
    assert [len(output.token_ids) for output in outputs] == [13, 9, 13, 13, 5]
    # The fifth waits for the second, which ends in the third call: its prompt and 3 · 4 checked tokens share a call.
    assert engine.batches == [(17, 4), (16, 4), (16, 4), (3 * 4 + 7, 4), (4, 1)]
    assert len(draft.calls) == 3 + 3 + 3 + 3
    assert llm.speculation.target_calls == 5


def test_nothing_is_proposed_past_the_last_token():
    """The proposals of a round are at most the tokens that are left, less the one the target adds."""
    for left in range(1, 6):
        llm, engine, _ = load(perfect, 4)
        llm.generate([[7, 8]], SamplingParams(max_tokens=1 + left))
        assert engine.batches[1:] == [(left, 1)]


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 7])
def test_a_run_ends_where_plain_decoding_ends(depth):
    """At an end token or stop string inside an accepted run, at the end of the context, at max tokens."""
    plain, _, _ = load(perfect, 0)
    (long,) = plain.generate([[5, 6, 7]], SamplingParams(max_tokens=60))
    for place in (3, 4, 5, 6):
        eos = long.token_ids[place]
        llm, _, _ = load(perfect, depth, eos=(eos,))
        (output,) = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=60))
        assert output.token_ids == long.token_ids[: long.token_ids.index(eos) + 1]
        assert output.finish_reason == "stop"
    for context in (11, 12, 13):
        llm, _, _ = load(perfect, depth, max_context=context)
        (output,) = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=60))
        assert (len(output.token_ids), output.finish_reason) == (context + 1 - 3, "length")


@pytest.mark.parametrize("depth", [2, 5])
def test_stop_strings_inside_a_run(depth):
    """The text ends before the stop string, and tokens of the run behind it are dropped."""
    tokenizer = byte_level()
    plain, _, _ = load(perfect, 0, tokenizer=tokenizer, vocab=270)
    (long,) = plain.generate(["abc"], SamplingParams(max_tokens=40))
    for place in (4, 9, 10):
        params = SamplingParams(max_tokens=40, stop=[long.text[place : place + 2]])
        (wanted,) = plain.generate(["abc"], params)
        llm, _, _ = load(perfect, depth, tokenizer=tokenizer, vocab=270)
        (output,) = llm.generate(["abc"], params)
        assert (output.text, output.token_ids, output.finish_reason) == (wanted.text, wanted.token_ids, "stop")


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(repetition_penalty=1.7),
        SamplingParams(temperature=0.8, top_k=3),
        SamplingParams(temperature=1.0, presence_penalty=0.5, frequency_penalty=1.0, logit_bias={1: 5, 5: 0.5}),
    ],
)
def test_proposals_follow_the_rules_of_the_request(params):
    """A draft that thinks as the target does proposes by the same rules, penalty of what was said included."""
    engine = PagedEngine(4, 64, 64, VOCAB)
    vocabulary = np.array([0, 2, 3, 5, 8, 9])
    stub = StubDraft(engine, perfect(engine), vocabulary)
    known = np.array([0, 3, 4, 9, 22])
    stub.last_logits = engine.dense_logits(known)[None, vocabulary]
    request = drawing(params, known[:2], known[2:3], np.random.default_rng(0))
    [(token, shares)] = Proposer(stub).choose_all(np.zeros(1, np.int64), [(request, known[3:].tolist())])
    hidden = np.full(VOCAB, -np.inf, np.float32)
    hidden[vocabulary] = stub.last_logits[0]
    ids, probabilities = candidates(hidden, params, History(known[:2], known[2:]))
    if params.greedy:
        assert (token, shares) == (ids[0], None)
    else:
        possible = probabilities > 0
        np.testing.assert_array_equal(shares.ids, ids[possible])
        np.testing.assert_allclose(shares.probabilities, probabilities[possible])
        assert token in ids


def test_streams_show_the_same_text_token_by_token():
    llm, _, _ = load(noisy, 4)
    deltas = list(llm.stream([[5]], SamplingParams(max_tokens=12)))
    assert [len(delta.token_ids) for delta in deltas] == [1] * 12


def test_sampled_outputs_are_repeatable_whatever_else_runs():
    params = SamplingParams(max_tokens=15, temperature=1.0, seed=3)
    for depth in (3, "auto"):
        (first,) = load(noisy, depth)[0].generate([[5, 6]], params)
        others = [SamplingParams(max_tokens=n, temperature=0.7, seed=n) for n in (9, 20)]
        outputs = load(noisy, depth)[0].generate([[1], [5, 6], [2] * 30], [others[0], params, others[1]])
        assert outputs[1].token_ids == first.token_ids


def test_auto_follows_what_is_accepted():
    """Deep chains for a perfect draft, hardly any and then none for one that is always wrong."""
    llm, engine, _ = load(perfect, "auto")
    (output,) = llm.generate([[5]], SamplingParams(max_tokens=150))
    assert output.speculation.accepted_length > 6
    llm, engine, draft = load(wrong, "auto", max_context=700)
    (output,) = llm.generate([[5]], SamplingParams(max_tokens=600))
    assert output.speculation.proposed < 60
    assert len(draft.calls) < 400  # given up: calls of the draft end before the output does
    assert sum(tokens for tokens, _ in engine.batches) < 600 + 60


def test_a_failing_draft_ends_the_requests_of_its_step():
    llm, engine, draft = load(perfect, 2)
    draft.fail_with = "no memory"
    (output,) = llm.generate([[5]], SamplingParams(max_tokens=4))
    assert (output.finish_reason, output.error) == ("error", "no memory")
    (output,) = llm.generate([[5]], SamplingParams(max_tokens=4))
    assert output.finish_reason == "length"
    llm.close()
    assert engine.closed
    assert draft.closed


def test_logits_that_are_no_numbers_end_a_request_in_the_middle_of_a_run():
    llm, engine, _ = load(perfect, 3)
    forward, calls = engine.forward, itertools.count()
    engine.forward = lambda batch: forward(batch) * (np.nan if next(calls) == 1 else 1.0)
    (output,) = llm.generate([[5]], SamplingParams(max_tokens=20))
    assert output.finish_reason == "error"
    assert llm.stepper.scheduler.pool.free == 255


def test_cancelled_requests_leave_nothing():
    llm, _, _ = load(noisy, 3)
    stream = llm.stream([[5], [6]], SamplingParams(max_tokens=30))
    for _ in range(7):
        next(stream)
    stream.close()
    assert llm.stepper.scheduler.pool.free == 255


@pytest.mark.parametrize("depth", [-1, 17, 1.5, True, "always", None])
def test_senseless_depths_are_refused(depth):
    with pytest.raises(UsageError, match="auto or a number from 0 to 16"):
        load(perfect, depth)


def test_a_batch_must_fit_a_step_with_its_proposals():
    with pytest.raises(UsageError, match="from 0 to 3"):
        load(perfect, 4, max_batch=8, max_tokens_per_step=32)
    load(perfect, 3, max_batch=8, max_tokens_per_step=32)


def test_a_draft_needs_the_targets_pages():
    engine = PagedEngine(4, 64, 64, VOCAB)
    draft = StubDraft(engine, perfect(engine))
    draft.num_pages = 63
    with pytest.raises(AngelForgeError, match="has 63 pages of 4 tokens, but the target's has 64 of 4"):
        LLM.from_engine(engine, draft=draft)


def test_without_a_draft_nothing_is_reported():
    llm = LLM.from_engine(PagedEngine(4, 64, 64, VOCAB))
    (output,) = llm.generate([[5]], SamplingParams(max_tokens=3))
    assert output.speculation is None
    assert llm.speculation is None


def test_reports_are_json():
    llm, _, _ = load(noisy, 3)
    (output,) = llm.generate([[5]], SamplingParams(max_tokens=30))
    report = output.to_dict()["speculation"]
    assert set(report) == {field.name for field in dataclasses.fields(output.speculation)}
    assert report["draft_seconds"] > 0
    assert report["verify_seconds"] > 0
    assert report["accepted_length"] == 1 + report["accepted"] / report["rounds"]
    assert llm.speculation.accepted == report["accepted"]
