"""Schedules on tiny engines: requests, what they give alone, and what must hold between steps whatever runs."""

from collections import Counter, deque

import numpy as np
import torch
from hypothesis import strategies as st

from angelforge.runtime.limits import Limits
from angelforge.runtime.request import Request
from angelforge.runtime.sampler import sample
from angelforge.runtime.sampling import SamplingParams
from angelforge.runtime.speculation import Speculator
from angelforge.runtime.stepper import Stepper
from support.paged_engine import PagedEngine
from support.stub_draft import StubDraft, noisy, perfect, wrong

MOST_STEPS = 2000  # more than any schedule of a test needs
CONTEXT, VOCAB, EOS = 40, 23, frozenset({1})
MODEL = PagedEngine(max_context=CONTEXT, vocab_size=VOCAB)  # weights for the dense reference; its pool stays unused
DRAFTS = {"perfect": perfect, "wrong": wrong, "noisy": noisy}
BEGINS = [[2, 9, 4, 4, 17, 5, 3, 8, 12, 6, 20, 7] * 3, [2, 9, 4, 4, 17, 5, 11, 8, 12, 6, 20, 7] * 3]

PARAMS = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 25),
    temperature=st.sampled_from([0.0, 0.0, 1.0]),
    top_k=st.sampled_from([0, 5]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 5),
    ignore_eos=st.booleans(),
    prompt_logprobs=st.sampled_from([None, None, None, 1]),
)
PROMPTS = st.one_of(
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=CONTEXT),
    # prompts that begin alike, so that pages are shared
    st.builds(
        lambda begin, cut, end: (begin[:cut] + end)[:CONTEXT],
        st.sampled_from(BEGINS),
        st.integers(0, 36),
        st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=3),
    ),
)
ASKED = st.tuples(PROMPTS, PARAMS)


@st.composite
def limits_of(draw, depth=0):
    """Limits that hold at least one request of any length, and `depth` proposals for each of a batch."""
    page_size = draw(st.integers(1, 9))
    least = -(-CONTEXT // page_size) + 1
    pages = draw(st.integers(least, least + 4) | st.integers(least, 60))
    batch = draw(st.integers(1, 5))
    tokens = (1 + depth) * batch + draw(st.sampled_from([0, 1, 5, 50]))
    rows = draw(st.sampled_from([None, None, (1 + depth) * batch]))
    return Limits(page_size, pages, CONTEXT, batch, tokens, rows)


class Walk:
    """A grammar: after each token one of eight others may come."""

    def __init__(self):
        self.last = 0

    def mask(self):
        allowed = sum(1 << (self.last * 7 + 3 * step) % VOCAB for step in range(8))
        return np.array([allowed], np.uint32)

    def accept(self, token):
        self.last = token


def run(stepper, most=MOST_STEPS):
    """Steps until there is nothing to do; a schedule that never comes to its end fails."""
    assert any(not stepper.step() for _ in range(most))


def new_request(index, prompt, params, constrained=False):
    length = min(len(prompt) + params.max_tokens, CONTEXT + 1)
    ends = frozenset() if params.ignore_eos else EOS
    return Request(index, np.array(prompt), params, length, deque(), ends, constraint=Walk() if constrained else None)


def alone(prompt, params, constrained=False):
    """The output without pages, packing, scheduling and drafts: the whole sequence again for every token."""
    request = new_request(0, prompt, params, constrained)
    while not request.finished:
        request.accept(int(sample(MODEL.dense_logits(request.known)[None], [request])[0]))
    return request.outbox[-1].output


class Serving:
    """A stepper over tiny engines, watched; with `device` the logits are torch tensors."""

    def __init__(self, limits, draft="noisy", vocabulary=None, depth=0, device=False):
        self.limits = limits
        self.engine = PagedEngine(limits.page_size, limits.num_pages, CONTEXT, VOCAB)
        if device:
            forward = self.engine.forward
            self.engine.forward = lambda batch: torch.from_numpy(forward(batch))
        self.speculator = None
        if depth != 0:
            self.draft = StubDraft(self.engine, DRAFTS[draft](self.engine), vocabulary)
            self.draft.where = torch.from_numpy if device else self.draft.where
            self.speculator = Speculator(self.draft, limits, depth)
        self.stepper = Stepper(self.engine, limits, self.speculator)
        self.scheduler = self.stepper.scheduler
        self.pool = self.scheduler.pool
        self.requests = []
        self.steps = 0
        self.other = []  # leases of scores
        self._published = {}

    def add(self, prompt, params, constrained=False):
        request = new_request(len(self.requests), prompt, params, constrained)
        self.stepper.add(request)
        self.requests.append(request)
        return request

    def step(self):
        """One step; False if there was nothing to do. A schedule that never comes to its end fails."""
        self.steps += 1
        assert self.steps < MOST_STEPS
        worked = self.stepper.step()
        self.check()
        return worked

    def run(self):
        """Steps until there is nothing to do."""
        while self.step():
            pass

    @property
    def lines(self):
        """Of histories that are kept on a device."""
        sampler = self.stepper._chooser._sampler
        return 0 if sampler is None else sampler.histories.lines

    def check(self):
        self._check_pages()
        self._check_order()
        self._check_contents()
        assert self.lines <= sum(request.history is not None for request in self.requests)
        for request in self.requests:
            assert request.finished or (request in self.scheduler.running) != (request in self.scheduler.waiting)

    def check_sizes(self):
        """Every call kept to its limits."""
        assert all(tokens <= self.limits.max_tokens_per_step for tokens, _ in self.engine.batches)
        assert all(sequences <= self.limits.max_batch for _, sequences in self.engine.batches)

    def _check_pages(self):
        """Each page is held as often as it is counted, and is unused in one place otherwise; page 0 is nobody's."""
        pool = self.pool
        leases = [r.lease for r in self.requests if r.lease is not None] + self.other
        held = Counter(page for lease in leases for page in lease.pages[: lease.count].tolist())
        assert [held[page] for page in range(self.limits.num_pages)] == pool._uses
        assert sorted([*held, *pool._empty, *pool._idle]) == list(range(1, self.limits.num_pages))
        assert all((request.lease is not None) == (request in self.scheduler.running) for request in self.requests)
        # What was read or written twice in one call was seen by `Batch.check`; shared pages must be published ones.
        assert all(pool._keys[page] is not None for page, count in held.items() if count > 1)

    def _check_order(self):
        """Requests run and wait in the order they came, and those that wait are younger than those that run."""
        order = [request.index for request in (*self.scheduler.running, *self.scheduler.waiting)]
        assert order == sorted(order)

    def _check_contents(self):
        """Published pages never change."""
        engine, found = self.engine, {}
        for key, page in self.pool._published.items():
            found[key, page] = engine.pool[page].copy()
            if (key, page) in self._published:
                np.testing.assert_array_equal(found[key, page], self._published[key, page])
        self._published = found
        for request in self.requests:
            if request.lease is None or request.finished:
                continue
            places = np.arange(request.computed)
            hidden = engine.embedding[request.tokens[places]] + engine.place[places]
            held = engine.pool[request.lease.pages[places // engine.page_size], :, places % engine.page_size]
            for kind, matrix in enumerate((engine.key, engine.value)):
                wanted = np.array([matrix @ x for x in hidden]).reshape(held[:, kind].shape)
                np.testing.assert_array_equal(held[:, kind], wanted)
