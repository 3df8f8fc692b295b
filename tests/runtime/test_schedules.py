"""Whatever is asked for, in whatever order and sizes: every request gets what it would get alone."""

import itertools
from collections import deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.paged_engine import PagedEngine

from angelforge.errors import UsageError
from angelforge.runtime.limits import Limits
from angelforge.runtime.request import Request
from angelforge.runtime.sampler import sample
from angelforge.runtime.sampling import SamplingParams
from angelforge.runtime.scheduler import Scheduler
from angelforge.runtime.stepper import Stepper

CONTEXT, VOCAB, EOS = 40, 23, frozenset({1})
MODEL = PagedEngine(max_context=CONTEXT, vocab_size=VOCAB)  # weights for the dense reference; its pool stays unused

PARAMS = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 12),
    temperature=st.sampled_from([0.0, 1.0]),
    top_k=st.sampled_from([0, 5]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    seed=st.integers(0, 5),
)
ASKED = st.tuples(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=CONTEXT), PARAMS)


def new_request(index, prompt, params, outbox=None):
    length = min(len(prompt) + params.max_tokens, CONTEXT + 1)
    return Request(index, np.array(prompt), params, length, deque() if outbox is None else outbox, EOS)


def alone(prompt, params):
    """The output without pages, packing and scheduling: the whole sequence again for every token."""
    request = new_request(0, prompt, params)
    while not request.finished:
        request.accept(int(sample(MODEL.dense_logits(request.known)[None], [request])[0]))
    return request.outbox[-1].output


@st.composite
def limits(draw):
    """Limits that hold at least one request of any length."""
    page_size = draw(st.integers(1, 9))
    pages = draw(st.integers(-(-CONTEXT // page_size) + 1, 60))
    batch = draw(st.integers(1, 5))
    return Limits(page_size, pages, CONTEXT, batch, batch + draw(st.sampled_from([0, 1, 5, 50])))


# (prompt, params, the step before which it comes, the step before which it is cancelled if it has come by then)
PLANS = st.lists(st.tuples(ASKED, st.integers(0, 25), st.none() | st.integers(0, 40)), min_size=1, max_size=7)


def check_a_schedule(limits, plans, seed):
    """Runs the plans with permuted pages; outputs, pages and step sizes are as they must be."""
    engine = PagedEngine(limits.page_size, limits.num_pages, CONTEXT, VOCAB)
    stepper = Stepper(engine, limits)
    pool = stepper.scheduler.pool
    pool._free = np.random.default_rng(seed).permutation(pool._free).tolist()
    requests, cancelled = [new_request(i, *asked) for i, (asked, *_) in enumerate(plans)], set()
    for step in itertools.count():
        for request, (_, arrival, cancel) in zip(requests, plans, strict=True):
            if arrival == step:
                stepper.scheduler.add(request)
            if cancel == step >= arrival and not request.finished:
                stepper.end(request)
                cancelled.add(request.index)
        worked = stepper.step()
        held = [page for r in requests if r.lease for page in r.lease.pages[: r.lease.count].tolist()]
        assert sorted(held + pool._free) == list(range(1, limits.num_pages))
        if not worked and step > 25:
            break
    assert pool.promised == 0
    assert pool.free == pool.capacity
    for request, (asked, *_) in zip(requests, plans, strict=True):
        output, wanted = request.outbox[-1].output, alone(*asked)
        assert tuple(itertools.chain(*(delta.token_ids for delta in request.outbox))) == output.token_ids
        if request.index in cancelled:
            assert output.finish_reason == "cancelled"
            assert output.token_ids == wanted.token_ids[: len(output.token_ids)]
        else:
            assert (output.token_ids, output.finish_reason) == (wanted.token_ids, wanted.finish_reason)
    assert all(tokens <= limits.max_tokens_per_step for tokens, _ in engine.batches)
    assert all(sequences <= limits.max_batch for _, sequences in engine.batches)


@settings(max_examples=150)
@given(limits(), PLANS, st.integers(0, 2**32))
def test_outputs_do_not_depend_on_what_else_runs(limits, plans, seed):
    """Requests come and are cancelled between steps; sizes of pages, batches and steps vary."""
    check_a_schedule(limits, plans, seed)


@pytest.mark.full
@settings(max_examples=5000)
@given(limits(), PLANS, st.integers(0, 2**32))
def test_outputs_do_not_depend_on_what_else_runs_in_thousands_of_schedules(limits, plans, seed):
    check_a_schedule(limits, plans, seed)


def run(stepper, *requests):
    for request in requests:
        stepper.scheduler.add(request)
    while stepper.step():
        pass


def ids(*tokens, count=3, **more):
    return list(tokens), SamplingParams(max_tokens=count, **more)


def test_decodes_ride_along_with_a_chunked_prompt():
    engine = PagedEngine(4, 64, CONTEXT, VOCAB)
    stepper = Stepper(engine, Limits(4, 64, CONTEXT, 4, 8))
    first = new_request(0, *ids(2, 3, count=6))
    stepper.scheduler.add(first)
    stepper.step()
    run(stepper, new_request(1, *ids(*range(2, 22), count=1)))
    # Steps of 8 tokens: one decoded token of the first and 7 of the second's 20 at a time.
    assert engine.batches[:4] == [(2, 1), (8, 2), (8, 2), (7, 2)]


def test_requests_start_in_the_order_they_came():
    """The first waits for pages; the second would fit, but does not overtake it."""
    stepper = Stepper(PagedEngine(4, 9, CONTEXT, VOCAB), Limits(4, 9, CONTEXT, 4, 64))
    running, large, small = (new_request(i, *ids(2, count=n)) for i, n in enumerate([16, 24, 2]))
    for request in (running, large, small):
        stepper.scheduler.add(request)
    stepper.step()
    assert stepper.scheduler.running == [running]
    assert list(stepper.scheduler.waiting) == [large, small]
    run(stepper)
    assert all(request.finished for request in (running, large, small))


def test_a_request_that_can_never_fit_is_refused_and_the_rest_runs():
    stepper = Stepper(PagedEngine(4, 5, CONTEXT, VOCAB), Limits(4, 5, CONTEXT, 4, 64))
    with pytest.raises(UsageError, match="prompt has 10 tokens and up to 8 are to follow, but the KV cache holds 16"):
        stepper.scheduler.add(new_request(0, *ids(*[2] * 10, count=8)))
    fits = new_request(1, *ids(*[2] * 10, count=7))
    run(stepper, fits)
    assert fits.outbox[-1].output.token_ids == alone([2] * 10, fits.params).token_ids


def test_a_failing_engine_ends_the_requests_of_its_step_only():
    engine = PagedEngine(4, 64, CONTEXT, VOCAB)
    stepper = Stepper(engine, Limits(4, 64, CONTEXT, 1, 64))
    engine.fail_with = "The device was lost."
    first, second = new_request(0, *ids(2)), new_request(1, *ids(3))
    run(stepper, first, second)
    output = first.outbox[-1].output
    assert (output.finish_reason, output.error) == ("error", "The device was lost.")
    assert second.outbox[-1].output.token_ids == alone([3], second.params).token_ids
    assert stepper.scheduler.pool.promised == 0


def test_logits_that_are_not_finite_end_one_request_with_a_message():
    engine = PagedEngine(4, 64, CONTEXT, VOCAB)
    engine.embedding[7] = np.nan
    stepper = Stepper(engine, Limits(4, 64, CONTEXT, 4, 64))
    bad, good = new_request(0, *ids(2, 7)), new_request(1, *ids(3))
    run(stepper, bad, good)
    assert "no finite logits" in bad.outbox[-1].output.error
    assert good.outbox[-1].output.token_ids == alone([3], good.params).token_ids


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 9, 9, 1, 1), "page_size is 0"),
        ((4, 1, 9, 1, 1), "has 1 pages"),
        ((4, 9, 0, 1, 1), "max_context is 0"),
        ((4, 9, 9, 0, 1), "max_batch is 0"),
        ((4, 9, 9, 8, 7), "max_tokens_per_step is 7, but every one of max_batch = 8"),
        ((64, 2**25, 9, 1, 1), "more than 2³¹"),
    ],
)
def test_limits_that_contradict_each_other_are_refused(sizes, message):
    with pytest.raises(UsageError, match=message):
        Limits(*sizes)


def test_nothing_to_do_is_no_step():
    scheduler = Scheduler(Limits(4, 9, CONTEXT, 1, 1))
    assert scheduler.schedule() == []
