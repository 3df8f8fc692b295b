"""The sampling rules against a plain, sorting version of them; parameters that make no sense are refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from angelforge.errors import UsageError
from angelforge.runtime.distribution import candidates, processed_distribution
from angelforge.runtime.history import History
from angelforge.runtime.sampling import SamplingParams
from angelforge.runtime.selection import top_ids

NOTHING = History(np.empty(0, np.int64))


def plain_distribution(logits, params, prompt, output, allowed=None):
    """Every rule over the sorted whole vocabulary, in f64."""
    scores = logits.astype(np.float64)
    for token, value in params.logit_bias.items():
        scores[token] += value
    for token in {*prompt.tolist(), *output.tolist()}:
        scores[token] = (
            scores[token] / params.repetition_penalty
            if scores[token] > 0
            else (scores[token] * params.repetition_penalty)
        )
    for token in output.tolist():
        scores[token] -= params.frequency_penalty
    for token in set(output.tolist()):
        scores[token] -= params.presence_penalty
    if allowed is not None:
        scores[~allowed] = -np.inf
    if params.temperature == 0:
        return np.eye(len(scores))[scores.argmax()]
    scores = scores / params.temperature
    if params.top_k:
        scores[scores < np.sort(scores)[::-1][: params.top_k][-1]] = -np.inf
    if params.top_p < 1:
        order = np.argsort(-scores, kind="stable")
        probabilities = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
        before = np.cumsum(probabilities[order]) - probabilities[order]
        scores[order[before >= params.top_p]] = -np.inf
    probabilities = np.exp(scores - scores.max())
    probabilities[probabilities < params.min_p] = 0
    return probabilities / probabilities.sum()


def mask_words(allowed):
    """Bits of ids as a constraint gives them."""
    words = np.zeros(-(-len(allowed) // 32), np.uint32)
    for token in np.flatnonzero(allowed).tolist():
        words[token // 32] |= np.uint32(1 << token % 32)
    return words


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 0.7, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 3, 20, 10**6]),
    top_p=st.sampled_from([0.013, 0.5, 0.877, 0.951, 1.0]),
    min_p=st.sampled_from([0.0, 0.0513, 0.4271, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.05, 2.0, 0.5]),
    presence_penalty=st.sampled_from([0.0, 1.3, -0.7]),
    frequency_penalty=st.sampled_from([0.0, 0.9, -2.0]),
    logit_bias=st.sampled_from([{}, {0: 3.5}, {4: -100, 2: 1.25}]),
)


@given(
    st.integers(0, 2**32), st.sampled_from([5, 33, 300, 5000]), st.sampled_from([0.1, 1.0, 5.0]), PARAMS, st.booleans()
)
def test_the_distribution_is_that_of_the_rules_in_their_order(seed, vocab, spread, params, masked):
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal(vocab) * spread).astype(np.float32)
    prompt, output = rng.integers(0, vocab, 7), rng.integers(0, min(vocab, 9), 6)
    allowed = rng.random(vocab) < 0.7
    allowed[3] = True
    mask = mask_words(allowed) if masked else None
    found = processed_distribution(logits, params, History(prompt, output), mask)
    wanted = plain_distribution(logits, params, prompt, output, allowed if masked else None)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert found.sum() == pytest.approx(1)
    ids, probabilities = candidates(logits, params, History(prompt, output), mask)
    assert (np.diff(ids) > 0).all()
    assert np.array_equal(probabilities, found[ids])


@given(st.integers(0, 2**32), st.sampled_from([1, 63, 64, 300, 5000]), st.integers(1, 40), st.booleans())
def test_top_ids_are_the_largest_with_their_ties_in_order(seed, size, count, coarse):
    values = np.random.default_rng(seed).standard_normal(size).astype(np.float32)
    values = np.round(values * 2) if coarse else values
    order = np.argsort(-values, kind="stable")
    threshold = values[order[min(count, size) - 1]]
    assert top_ids(values, count).tolist() == order[values[order] >= threshold].tolist()


def test_ties_go_to_the_lower_id():
    logits = np.array([1, 3, 3, 2], np.float32)
    assert candidates(logits, SamplingParams(), NOTHING)[0].tolist() == [1]
    assert candidates(logits, SamplingParams(temperature=1, top_p=0.1), NOTHING)[0].tolist() == [1]
    assert candidates(logits, SamplingParams(temperature=1, top_k=1), NOTHING)[0].tolist() == [1, 2]


def test_top_p_keeps_no_more_than_hold_exactly_that_probability():
    logits = np.log(np.array([1, 0.5, 0.25, 0.25], np.float32))
    for top_p, kept in ((0.5, [0]), (0.5001, [0, 1]), (0.75, [0, 1]), (0.7501, [0, 1, 2])):
        assert candidates(logits, SamplingParams(temperature=1, top_p=top_p), NOTHING)[0].tolist() == kept


def test_the_penalty_counts_a_repeated_token_once_and_leaves_the_logits_alone():
    logits = np.array([2.0, -2.0, 1.9], np.float32)
    before = logits.copy()
    params = SamplingParams(temperature=1, repetition_penalty=2)
    penalised = np.array([1.0, -4.0, 1.9])
    wanted = np.exp(penalised) / np.exp(penalised).sum()
    np.testing.assert_allclose(
        processed_distribution(logits, params, History(np.array([0, 1, 0, 0]))), wanted, rtol=1e-6
    )
    assert (logits == before).all()


@pytest.mark.parametrize(
    "params", [SamplingParams(), SamplingParams(temperature=1), SamplingParams(temperature=1, top_k=2)]
)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_without_a_finite_best_logit_nothing_can_come(params, value):
    logits = np.full(5, -np.inf, np.float32)
    logits[2] = value
    assert candidates(logits, params, NOTHING)[0].size == 0
    assert not processed_distribution(logits, params, NOTHING).any()


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-40, 1e-300])
@pytest.mark.parametrize("more", [{}, {"top_p": 0.9}, {"top_k": 3}])
def test_tiny_temperatures_take_the_best_token(temperature, more):
    logits = np.array([1.0, 5.0, -3.0, 4.0], np.float32)
    found = processed_distribution(logits, SamplingParams(temperature=temperature, **more), NOTHING)
    np.testing.assert_array_equal(found, [0, 1, 0, 0])


@pytest.mark.parametrize("temperature", [1e30, 1e39, 1e300])
@pytest.mark.parametrize("more", [{}, {"top_p": 0.9}, {"min_p": 1.0}])
def test_huge_temperatures_make_all_alike_that_can_come(temperature, more):
    """What a grammar forbids stays forbidden."""
    logits = np.array([1, -np.inf, 5, -3, -np.inf], np.float32)
    found = processed_distribution(logits, SamplingParams(temperature=temperature, **more), NOTHING)
    np.testing.assert_allclose(found, [1 / 3, 0, 1 / 3, 1 / 3, 0], rtol=1e-6)


def test_masked_tokens_never_come():
    logits = np.array([-np.inf, 1.0, -np.inf, 0.5], np.float32)
    for params in (SamplingParams(temperature=1), SamplingParams(temperature=1, top_k=3, top_p=0.9999999)):
        assert processed_distribution(logits, params, NOTHING)[[0, 2]].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", float("nan")),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {True: 1.0}),
        ("logit_bias", {"5": 1.0}),
        ("logit_bias", {5: 101}),
        ("logit_bias", {5: "much"}),
        ("logit_bias", [5]),
        ("logprobs", 21),
        ("logprobs", -1),
        ("logprobs", True),
        ("prompt_logprobs", 21),
        ("max_tokens", True),
        ("max_tokens", 1.5),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("top_k", -1),
        ("top_p", 0),
        ("top_p", 1.01),
        ("min_p", -0.1),
        ("min_p", float("inf")),
        ("repetition_penalty", 0),
        ("seed", -1),
        ("stop", ("",)),
        ("stop", 5),
        ("stop", [7]),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", 3),
    ],
)
def test_parameters_that_make_no_sense_are_named(name, value):
    with pytest.raises(UsageError, match=name):
        SamplingParams(**{name: value})


def test_lists_and_single_stops_are_kept_as_tuples():
    params = SamplingParams(stop="end", stop_token_ids=[1, 2])
    assert (params.stop, params.stop_token_ids) == (("end",), (1, 2))
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    hash(params)


def test_a_bias_is_frozen_and_equal_by_value():
    pairs = {7: 1, 3: -2.5}
    params = SamplingParams(logit_bias=pairs)
    pairs[8] = 1.0
    assert dict(params.logit_bias) == {3: -2.5, 7: 1.0}
    assert params == SamplingParams(logit_bias={3: -2.5, 7: 1.0})
    assert hash(params) == hash(SamplingParams(logit_bias={3: -2.5, 7: 1.0}))
    assert params.bias.ids.tolist() == [3, 7]
    assert SamplingParams(max_tokens=0, prompt_logprobs=0).max_tokens == 0


@given(st.lists(st.integers(0, 9)), st.lists(st.integers(0, 20), max_size=40), st.lists(st.integers(0, 25), max_size=9))
def test_a_history_counts_what_came_out_and_forgets_what_is_taken_back(prompt, output, chain):
    history = History(np.array(prompt, np.int64), np.array(output, np.int64))
    for token in chain:
        history.add(token)
    assert dict(zip(history.ids, history.counts, strict=True)) == {
        token: [*output, *chain].count(token) for token in {*prompt, *output, *chain}
    }
    for token in reversed(chain):
        history.take_back(token)
    assert dict(zip(history.ids, history.counts, strict=True)) == {
        token: output.count(token) for token in {*prompt, *output}
    }
