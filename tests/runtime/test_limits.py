"""Sizes that contradict each other are refused; a step keeps to its rows of logits, whoever asks for them."""

import numpy as np
import pytest
from support.serving import CONTEXT, Serving

from angelforge.errors import UsageError
from angelforge.runtime.limits import Limits
from angelforge.runtime.sampling import SamplingParams


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0, 9, 40, 4, 64), "page_size is 0"),
        ((4, 1, 40, 4, 64), "at least 2 are needed"),
        ((64, 2**26, 40, 4, 64), "slots"),
        ((4, 9, 40, 4, 3), "max_tokens_per_step is 3"),
        ((4, 9, 40, 4, 64, 3), "max_rows is 3"),
    ],
)
def test_limits_that_contradict_each_other_are_told(values, message):
    with pytest.raises(UsageError, match=message):
        Limits(*values)


@pytest.mark.parametrize("depth", [0, 2])
def test_no_step_has_more_rows_of_logits_than_the_engine_computes_at_once(depth):
    """Prompts that are scored share the rows with decodes and their proposals, and take more steps."""
    serving = Serving(Limits(4, 64, CONTEXT, 3, 64, 9), depth=depth)
    prompt = np.random.default_rng(0).integers(2, 20, 30).tolist()
    for params in (SamplingParams(max_tokens=20), SamplingParams(max_tokens=3, prompt_logprobs=0)):
        serving.add(prompt, params)
    serving.add(prompt, SamplingParams(max_tokens=0, prompt_logprobs=2))
    rows = []
    while serving.step():
        rows.append(len(serving.engine.last_batch.logit_indices))
    assert max(rows) == 9
    assert all(request.finished for request in serving.requests)
    assert [len(request.outbox[-1].output.prompt_logprobs or ()) for request in serving.requests] == [0, 30, 30]


def test_chains_fit_the_rows():
    with pytest.raises(UsageError, match="from 0 to 2"):
        Serving(Limits(4, 64, CONTEXT, 3, 64, 9), depth=3)
