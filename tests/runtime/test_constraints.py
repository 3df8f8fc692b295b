"""A constraint decides which tokens can come; what it says about one request is nothing to the others."""

from collections import deque

import numpy as np
import pytest
import support.serving
from support.paged_engine import PagedEngine
from support.stub_draft import StubDraft, perfect

from angelforge import LLM, SamplingParams
from angelforge.errors import AngelForgeError
from angelforge.runtime.constraint import allowed_ids

VOCAB = 70


class Rising:
    """Allows only ids above the last, in steps of at most five; refuses to accept `poison`."""

    def __init__(self, poison=None):
        self.accepted, self.poison = [], poison

    def mask(self):
        words = np.zeros(-(-VOCAB // 32), np.uint32)
        last = self.accepted[-1] if self.accepted else -1
        for token in range(last + 1, min(last + 6, VOCAB)):
            words[token // 32] |= np.uint32(1 << token % 32)
        return words

    def accept(self, token):
        if token == self.poison:
            raise AngelForgeError("The grammar knows no such token.")
        self.accepted.append(token)


def run(llm, constraints, params):
    outbox, outputs = deque(), {}
    for index, constraint in enumerate(constraints):
        llm.stepper.add(llm.make_request([3, 4], params, outbox, index=index, constraint=constraint))
    support.serving.run(llm.stepper)
    for delta in outbox:
        if delta.output is not None:
            outputs[delta.index] = delta.output
    return [outputs[index] for index in range(len(constraints))]


@pytest.mark.parametrize("options", [{}, {"temperature": 3.0, "seed": 2}])
@pytest.mark.parametrize("depth", [0, 3])
def test_only_what_is_allowed_comes_and_others_are_free(options, depth):
    params = SamplingParams(max_tokens=8, **options)
    engine = PagedEngine(4, 64, 64, VOCAB)
    llm = LLM.from_engine(engine, draft=StubDraft(engine, perfect(engine)), speculate=depth)
    (free,) = run(llm, [None], params)
    first, second = Rising(), None
    bound, other = run(llm, [first, second], params)
    steps = np.diff([-1, *bound.token_ids])
    assert ((steps > 0) & (steps <= 5)).all()
    assert first.accepted == list(bound.token_ids[:-1])  # not the one that ends it
    assert other.token_ids == free.token_ids
    assert not bound.speculation or bound.speculation.proposed == 0


def test_a_constraint_that_fails_ends_its_request_only():
    llm = LLM.from_engine(PagedEngine(4, 64, 64, VOCAB))
    (wanted,) = run(llm, [Rising()], SamplingParams(max_tokens=8))
    failed, fine = run(llm, [Rising(wanted.token_ids[2]), Rising()], SamplingParams(max_tokens=8))
    assert (failed.finish_reason, failed.error) == ("error", "The grammar knows no such token.")
    assert fine.token_ids == wanted.token_ids
    assert llm.stepper.scheduler.pool.free == llm.stepper.scheduler.pool.capacity


def test_masks_are_bits_of_little_endian_words():
    allowed = np.random.default_rng(0).random(157_184) < 0.5
    words = np.packbits(allowed, bitorder="little").view("<u4")
    np.testing.assert_array_equal(allowed_ids(words, 157_184), allowed)
    assert not allowed_ids(words[:10], 157_184)[320:].any()
