"""Logprobs are the log-softmax of the raw logits, of outputs and prompts, whatever else a request asks for."""

import numpy as np
import pytest
import torch
from support.device_works import EVERY_WORK
from support.paged_engine import PagedEngine
from support.stub_draft import StubDraft, noisy

from angelforge import LLM, SamplingParams
from angelforge.errors import AngelForgeError, UsageError
from angelforge.runtime.device_round import Scored
from angelforge.runtime.device_sampling import DeviceSampler
from angelforge.runtime.logprobs import row_logprob

VOCAB = 37


def load(depth=0, max_tokens_per_step=128, **options):
    engine = PagedEngine(4, 64, 64, VOCAB)
    draft = StubDraft(engine, noisy(engine))
    return LLM.from_engine(engine, draft=draft, speculate=depth, max_tokens_per_step=max_tokens_per_step, **options)


def check(found, logits, token, count):
    """One place against f64."""
    wanted = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum())
    assert found.token == token
    assert found.logprob == pytest.approx(wanted[token], abs=1e-5)
    assert [place for place, _ in found.top] == np.argsort(-logits, kind="stable")[:count].tolist()
    assert [value for _, value in found.top] == pytest.approx([wanted[place] for place, _ in found.top], abs=1e-5)


PARAMS = [
    SamplingParams(max_tokens=9, logprobs=3),
    SamplingParams(max_tokens=9, logprobs=0, temperature=2.0, top_k=5, seed=1, frequency_penalty=1.5),
    SamplingParams(max_tokens=9, logprobs=20, logit_bias={4: 50.0}),
]


@pytest.mark.parametrize("depth", [0, 3])
@pytest.mark.parametrize("params", PARAMS)
def test_outputs_tell_the_raw_logprobs_of_their_tokens(depth, params):
    llm = load(depth)
    (output,) = llm.generate([[5, 6, 7]], params)
    known = [*output.prompt_token_ids, *output.token_ids]
    assert len(output.logprobs) == len(output.token_ids) == 9
    for place, (token, found) in enumerate(zip(output.token_ids, output.logprobs, strict=True)):
        check(found, llm._engine.dense_logits(np.array(known[: 3 + place])), token, params.logprobs)
    deltas = list(llm.stream([[5, 6, 7]], params))
    assert [len(delta.logprobs) for delta in deltas] == [len(delta.token_ids) for delta in deltas]
    assert output.prompt_logprobs is None


@pytest.mark.parametrize("depth", [0, 3])
def test_logits_on_a_device_tell_the_same(depth):
    prompts, params = [[5, 6, 7], [8], [9] * 5], [*PARAMS[:2], SamplingParams(max_tokens=5, prompt_logprobs=1)]
    wanted = load(depth).generate(prompts, params)
    llm = load(depth)
    forward = llm._engine.forward
    llm._engine.forward = lambda batch: torch.from_numpy(forward(batch))
    for found, output in zip(llm.generate(prompts, params), wanted, strict=True):
        assert found.token_ids == output.token_ids
        for name in ("logprobs", "prompt_logprobs"):
            for one, other in zip(getattr(found, name) or (), getattr(output, name) or (), strict=True):
                assert (one is None) == (other is None)
                if one is not None:
                    assert one.logprob == pytest.approx(other.logprob, abs=1e-5)
                    assert [place for place, _ in one.top] == [place for place, _ in other.top]


@pytest.mark.parametrize(("depth", "step"), [(0, 64), (0, 5), (2, 32)])
@pytest.mark.parametrize("count", [0, 1, 4])
def test_prompts_are_scored_in_whole_or_in_pieces(depth, step, count):
    prompt = np.random.default_rng(1).integers(0, VOCAB, 17).tolist()
    llm = load(depth, step, max_batch=3)
    params = SamplingParams(max_tokens=count, prompt_logprobs=2)
    plain = SamplingParams(max_tokens=12)
    outputs = llm.generate([prompt, prompt, [5]], [params, plain, plain])
    output = outputs[0]
    assert output.token_ids == outputs[1].token_ids[:count]
    assert (output.finish_reason, output.error, output.logprobs) == ("length", None, None)
    assert output.prompt_logprobs[0] is None
    for place, found in enumerate(output.prompt_logprobs[1:], 1):
        check(found, llm._engine.dense_logits(np.array(prompt[:place])), prompt[place], 2)


def test_a_prompt_of_one_token_has_nothing_to_tell():
    (output,) = load().generate([[5]], SamplingParams(max_tokens=0, prompt_logprobs=0))
    assert (output.prompt_logprobs, output.token_ids, output.finish_reason) == ((None,), (), "length")


def test_without_output_something_must_be_asked_for():
    with pytest.raises(UsageError, match="max_tokens is 0"):
        SamplingParams(max_tokens=0)


def test_a_bias_beyond_the_vocabulary_is_told():
    (output,) = load().generate([[5]], SamplingParams(logit_bias={VOCAB: 1.0}))
    assert f"the id {VOCAB}, but the model's ids are 0 to {VOCAB - 1}" in output.error


@EVERY_WORK
def test_rows_on_a_device_tell_the_same(work):
    logits = np.random.default_rng(3).standard_normal((4, 5000)).astype(np.float32) * 4
    tokens = [0, 17, 4999, int(logits[3].argmax())]
    logits[0, [3, 9, 4000]] = logits[0].max() + 1  # of ties the lowest ids are told
    scored = [Scored(row, token, 2 + row) for row, token in enumerate(tokens)]
    answer = DeviceSampler(torch.device("cpu"), work).answer(torch.tensor(logits), (), scored)
    for row, token in enumerate(tokens):
        check(row_logprob(logits[row], token, 2 + row), logits[row], token, 2 + row)
        check(answer.logprob(row, token, 2 + row), logits[row], token, 2 + row)


@EVERY_WORK
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_rows_that_are_not_finite_have_no_logprobs(work, value):
    logits = np.array([[0, value, 1]], np.float32)
    with pytest.raises(AngelForgeError, match="no finite logits"):
        row_logprob(logits[0], 0, 1)
    answer = DeviceSampler(torch.device("cpu"), work).answer(torch.from_numpy(logits), (), [Scored(0, 0, 1)])
    with pytest.raises(AngelForgeError, match="no finite logits"):
        answer.logprob(0, 0, 1)
