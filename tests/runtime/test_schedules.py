"""Whatever is asked for, in whatever order and sizes: every request gets what it would get alone."""

import itertools

import numpy as np
import pytest
import support.serving
from hypothesis import given, settings
from hypothesis import strategies as st
from support.paged_engine import PagedEngine
from support.serving import ASKED, CONTEXT, VOCAB, Serving, alone, limits_of, new_request

from angelforge.errors import UsageError
from angelforge.runtime.limits import Limits
from angelforge.runtime.sampling import SamplingParams
from angelforge.runtime.scheduler import Scheduler
from angelforge.runtime.stepper import Stepper


def check_a_schedule(limits, plans, seed):
    """Runs the plans with permuted pages; outputs, pages and step sizes are as they must be."""
    serving = Serving(limits)
    pool, stepper = serving.pool, serving.stepper
    pool._empty = np.random.default_rng(seed).permutation(pool._empty).tolist()
    cancelled = set()
    requests = [new_request(i, *asked) for i, (asked, *_) in enumerate(plans)]
    for step in itertools.count():
        for request, (_, arrival, cancel) in zip(requests, plans, strict=True):
            if arrival == step:
                stepper.add(request)
                request.index = len(serving.requests)  # the order they came in
                serving.requests.append(request)
            if cancel == step >= arrival and not request.finished:
                stepper.end(request)
                cancelled.add(request)
        if not serving.step() and step > 25:
            break
    assert pool.free == pool.capacity
    for request, (asked, *_) in zip(requests, plans, strict=True):
        output, wanted = request.outbox[-1].output, alone(*asked)
        assert tuple(itertools.chain(*(delta.token_ids for delta in request.outbox))) == output.token_ids
        if request in cancelled:
            assert output.finish_reason == "cancelled"
            assert output.token_ids == wanted.token_ids[: len(output.token_ids)]
        else:
            assert (output.token_ids, output.finish_reason) == (wanted.token_ids, wanted.finish_reason)
    serving.check_sizes()


# (prompt, params, the step before which it comes, the step before which it is cancelled if it has come by then)
PLANS = st.lists(st.tuples(ASKED, st.integers(0, 25), st.none() | st.integers(0, 40)), min_size=1, max_size=7)


@settings(max_examples=40)
@given(limits_of(), PLANS, st.integers(0, 2**32))
def test_outputs_do_not_depend_on_what_else_runs(limits, plans, seed):
    """Requests come and are cancelled between steps; sizes of pages, batches and steps vary."""
    check_a_schedule(limits, plans, seed)


@pytest.mark.full
@settings(max_examples=5000)
@given(limits_of(), PLANS, st.integers(0, 2**32))
def test_outputs_do_not_depend_on_what_else_runs_in_thousands_of_schedules(limits, plans, seed):
    check_a_schedule(limits, plans, seed)


def run(stepper, *requests):
    for request in requests:
        stepper.add(request)
    support.serving.run(stepper)


def ids(*tokens, count=3, **more):
    return list(tokens), SamplingParams(max_tokens=count, **more)


def test_decodes_ride_along_with_a_chunked_prompt():
    engine = PagedEngine(4, 64, CONTEXT, VOCAB)
    stepper = Stepper(engine, Limits(4, 64, CONTEXT, 4, 8))
    first = new_request(0, *ids(2, 3, count=6))
    stepper.add(first)
    stepper.step()
    run(stepper, new_request(1, *ids(*range(2, 22), count=1)))
    # Steps of 8 tokens: one decoded token of the first and 7 of the second's 20 at a time.
    assert engine.batches[:4] == [(2, 1), (8, 2), (8, 2), (7, 2)]


def test_nobody_overtakes_a_prompt_that_waits_for_pages():
    """The second waits for pages; the third would fit, but does not pass it."""
    stepper = Stepper(PagedEngine(4, 9, CONTEXT, VOCAB), Limits(4, 9, CONTEXT, 4, 64))
    running, large, small = (new_request(i, *ids(*[2 + i] * n, count=5)) for i, n in enumerate([16, 20, 1]))
    for request in (running, large, small):
        stepper.add(request)
    stepper.step()
    assert list(stepper.scheduler.running) == [running]
    assert list(stepper.scheduler.waiting) == [large, small]
    run(stepper)
    assert all(request.finished for request in (running, large, small))


def test_the_youngest_is_set_back_and_loses_nothing():
    """Two outputs of 24 tokens share 8 pages of 4: one has to wait for the other, and is still the next to go on."""
    serving = Serving(Limits(4, 9, CONTEXT, 4, 64))
    asked = [ids(2 + i, count=24, ignore_eos=True, temperature=1.0, seed=i) for i in range(3)]
    requests = [serving.add(*one) for one in asked]
    waited = False
    while serving.step():
        if serving.scheduler.set_back and not requests[0].finished:
            assert next(iter(serving.scheduler.running)) is requests[0]
        waited |= requests[1] in serving.scheduler.waiting and requests[1].length > 1
    assert waited
    for request, one in zip(requests, asked, strict=True):
        assert request.outbox[-1].output.token_ids == alone(*one).token_ids


def test_a_shared_prefix_is_stored_and_computed_once():
    serving = Serving(Limits(4, 64, CONTEXT, 8, 64))
    begin = list(range(2, 19))
    first = [serving.add([*begin, last], SamplingParams(max_tokens=2)) for last in (3, 4, 5)]
    serving.step()  # the others wait for what the first is about to fill
    assert serving.engine.batches == [(18, 1)]
    serving.step()
    assert serving.engine.batches[1] == (1 + 2 + 2, 3)
    tables = serving.engine.last_batch.page_table
    assert (tables[:, :4] == tables[0, :4]).all()
    assert len(set(tables[:, 4].tolist())) == 3
    while serving.step():
        pass
    assert [request.outbox[-1].output.cached_tokens for request in first] == [0, 16, 16]
    again = serving.add([*begin, 9], SamplingParams(max_tokens=2))
    serving.step()
    assert serving.engine.batches[-1] == (2, 1)
    assert again.cached_tokens == 16


def test_the_last_token_of_a_prompt_is_always_computed():
    serving = Serving(Limits(4, 64, CONTEXT, 8, 64))
    for wanted in (0, 12, 12):
        request = serving.add(list(range(2, 18)), SamplingParams(max_tokens=3))
        while serving.step():
            pass
        assert request.cached_tokens == wanted


def test_what_a_request_computed_before_it_was_set_back_was_not_in_the_cache():
    serving = Serving(Limits(4, 64, CONTEXT, 8, 8))
    request = serving.add(list(range(2, 22)), SamplingParams(max_tokens=3))
    serving.step()
    serving.scheduler._set_back(request)
    serving.step()
    assert (request.computed, request.cached_tokens) == (16, 0)


@pytest.mark.parametrize("draft", ["perfect", "wrong"])
@pytest.mark.parametrize("count", range(12, 20))
def test_outputs_are_prefixes_of_the_next_turn(draft, count):
    """But for what came in the last step, which the draft has not seen (`StubDraft` reads all that is shared)."""
    serving = Serving(Limits(4, 64, CONTEXT, 8, 64), draft, depth=3)
    request = serving.add([5, 6, 7], SamplingParams(max_tokens=count, ignore_eos=True))
    while serving.step():
        pass
    turn = serving.add([*request.known.tolist(), 4, 4], SamplingParams(max_tokens=9))
    serving.step()
    assert request.length - 9 < turn.cached_tokens <= request.length


def test_a_request_that_can_never_fit_is_refused_and_the_rest_runs():
    stepper = Stepper(PagedEngine(4, 5, CONTEXT, VOCAB), Limits(4, 5, CONTEXT, 4, 64))
    with pytest.raises(UsageError, match="prompt has 10 tokens and up to 8 are to follow, but the KV cache holds 16"):
        stepper.add(new_request(0, *ids(*[2] * 10, count=8)))
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
    assert stepper.scheduler.pool.free == stepper.scheduler.pool.capacity


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
