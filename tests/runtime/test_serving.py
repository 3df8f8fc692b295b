"""A state machine over everything that can happen to a scheduler: every request gets what it would get alone."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.serving import ASKED, CONTEXT, DRAFTS, VOCAB, Serving, alone, limits_of

from angelforge.runtime.limits import Limits
from angelforge.runtime.pages import Lease

VOCABULARIES = st.sampled_from([None, list(range(VOCAB)), [2, 3, 5, 7, 11, 13, 17, 19]])
DEPTH = 3
AMPLE = Limits(4, 64, CONTEXT, 1, 64)


class Schedules(RuleBasedStateMachine):
    """Requests that share prefixes come, go on, are set back and cancelled; drafts propose; scores take pages."""

    @initialize(
        limits=limits_of(DEPTH),
        draft=st.sampled_from(sorted(DRAFTS)),
        vocabulary=VOCABULARIES,
        depth=st.sampled_from([0, 1, 3, "auto"]),
        device=st.booleans(),
    )
    def begin(self, limits, draft, vocabulary, depth, device):
        self.draft = {"draft": draft, "vocabulary": vocabulary, "depth": depth}
        self.device = device  # where logits are and tokens are chosen
        self.serving = Serving(limits, **self.draft, device=device)
        self.asked, self.cancelled = [], set()

    @precondition(lambda self: len(self.asked) < 9)
    @rule(asked=ASKED, constrained=st.sampled_from([False, False, True]))
    def add(self, asked, constrained):
        self.asked.append((*asked, constrained))
        self.serving.add(*self.asked[-1])

    @rule(count=st.sampled_from([1, 1, 1, 2, 5]))
    def step(self, count):
        for _ in range(count):
            self.serving.step()

    @precondition(lambda self: self.serving.scheduler.running)
    @rule()
    def set_back(self):
        """As if an older one had needed its pages."""
        self.serving.scheduler._set_back(next(reversed(self.serving.scheduler.running)))

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def cancel(self, data):
        request = self.serving.requests[data.draw(st.integers(0, len(self.asked) - 1))]
        if not request.finished:
            self.serving.stepper.end(request)
            self.cancelled.add(request.index)

    @rule(tokens=st.integers(1, CONTEXT))
    def begin_score(self, tokens):
        serving = self.serving
        lease = Lease(serving.pool, serving.limits.pages_for(tokens))
        if lease.grow(serving.limits.pages_for(tokens)):
            serving.engine.pool[lease.pages[: lease.count]] = -7.0
            serving.other.append(lease)

    @precondition(lambda self: self.serving.other)
    @rule()
    def end_score(self):
        self.serving.other.pop().release()

    @invariant()
    def all_is_in_order(self):
        if hasattr(self, "serving"):
            self.serving.check()

    def teardown(self):
        if not hasattr(self, "serving"):
            return
        serving = self.serving
        while serving.other:
            serving.other.pop().release()
        while serving.step():
            pass
        assert serving.pool.free == serving.pool.capacity
        assert not serving.scheduler._coming
        assert not serving.scheduler.waiting
        assert serving.lines == 0
        serving.check_sizes()
        for request, asked in zip(serving.requests, self.asked, strict=True):
            self.check_output(request, *asked)

    def check_output(self, request, prompt, params, constrained):
        output = request.outbox[-1].output
        assert tuple(token for delta in request.outbox for token in delta.token_ids) == output.token_ids
        drafted = self.draft["depth"] != 0 and not params.greedy and not constrained
        summed = self.device and not params.greedy and params.top_k == 0  # there, where a sum may round otherwise
        wanted = (self.by_itself if drafted or summed else alone)(prompt, params, constrained)
        if request.index in self.cancelled:
            assert output.finish_reason == "cancelled"
            assert output.token_ids == wanted.token_ids[: len(output.token_ids)]
            return
        assert (output.token_ids, output.finish_reason) == (wanted.token_ids, wanted.finish_reason)
        if params.prompt_logprobs is not None:
            assert [found.token for found in output.prompt_logprobs[1:]] == prompt[1:]

    def by_itself(self, prompt, params, constrained):
        """With the same draft, and pages enough."""
        limits = self.serving.limits
        most = min(limits.max_tokens_per_step, limits.max_rows or 999) // limits.max_batch
        serving = Serving(Limits(4, 64, CONTEXT, 1, most, None), **self.draft, device=self.device)
        request = serving.add(prompt, params, constrained)
        while serving.step():
            pass
        return request.outbox[-1].output


class TestSchedules(Schedules.TestCase):
    settings = settings(max_examples=60, stateful_step_count=30)


@pytest.mark.full
class TestThousandsOfSchedules(Schedules.TestCase):
    settings = settings(max_examples=4000, stateful_step_count=50)
