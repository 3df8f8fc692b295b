"""POST /v1/completions with OpenAI's own client: what comes out is what the LLM gives."""

import math

import numpy as np
import openai
import pytest
from support.http_server import CALL, Running

from angelforge.runtime.validate.reference import load_reference
from angelforge.tools.toy import MODEL


def text_of(server: Running, prompt: object, **options: object) -> str:
    return server.client().completions.create(model="toy", prompt=prompt, temperature=0, **options).choices[0].text


def test_a_text_its_ids_and_lists_of_both_are_the_same_prompt(server: Running) -> None:
    ids = server.llm.tokenizer.encode(CALL)
    client = server.client()
    texts = []
    for prompt in (CALL, [CALL], ids, [ids]):
        answer = client.completions.create(model="toy", prompt=prompt, temperature=0, max_tokens=24)
        assert answer.usage.prompt_tokens == len(ids)
        assert answer.usage.total_tokens == len(ids) + answer.usage.completion_tokens
        texts.append(answer.choices[0].text)
    assert len(set(texts)) == 1
    assert texts[0]


def test_several_prompts_are_answered_in_their_order(server: Running) -> None:
    prompts = ["I have a cough.", "My ankle hurts.", "What is triage?"]
    together = server.client().completions.create(model="toy", prompt=prompts, temperature=0, max_tokens=12, n=1)
    assert [choice.index for choice in together.choices] == [0, 1, 2]
    assert [choice.text for choice in together.choices] == [text_of(server, one, max_tokens=12) for one in prompts]


def test_seeds_make_choices_repeatable_and_different(server: Running) -> None:
    def texts(seed: int) -> list[str]:
        answer = server.client().completions.create(
            model="toy", prompt="I have", n=4, seed=seed, max_tokens=16, temperature=1.5
        )
        return [choice.text for choice in answer.choices]

    assert texts(7) == texts(7)
    assert len(set(texts(7))) > 1
    assert texts(7) != texts(70)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("stop", [None, ["days", "."], ["cou"]])
def test_streamed_text_is_the_whole_text(server: Running, seed: int, stop: list[str] | None) -> None:
    """Also with several choices and stop strings; random bytes make characters that come in halves."""
    options = {"model": "toy", "prompt": CALL, "n": 3, "seed": seed, "max_tokens": 40, "temperature": 3.0, "stop": stop}
    client = server.client()
    whole = client.completions.create(**options)
    texts, reasons = [""] * 3, [None] * 3
    for chunk in client.completions.create(**options, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]


def test_usage_of_a_stream(server: Running) -> None:
    options = {"model": "toy", "prompt": [CALL, "Hi"], "n": 2, "max_tokens": 5, "temperature": 0}
    chunks = list(server.client().completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    whole = server.client().completions.create(**options).usage
    assert (
        chunks[-1].usage.prompt_tokens
        == whole.prompt_tokens
        == sum(len(server.llm.tokenizer.encode(text)) for text in (CALL, "Hi"))
    )
    assert chunks[-1].usage.completion_tokens == whole.completion_tokens


def test_echo_with_logprobs_scores_a_prompt(server: Running) -> None:
    """What lm-eval-harness asks for: the log probability of every token of a prompt, from the model's own logits."""
    ids = server.llm.tokenizer.encode(CALL)
    answer = server.client().completions.create(
        model="toy", prompt=[ids], echo=True, logprobs=1, max_tokens=0, temperature=0
    )
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, answer.usage.completion_tokens) == (CALL, "length", 0)
    found = choice.logprobs
    assert len(found.tokens) == len(ids)
    assert found.token_logprobs[0] is None
    logits = load_reference(MODEL).logits(ids).astype(np.float64)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(found.token_logprobs[1:], logs[np.arange(len(ids) - 1), ids[1:]], atol=1e-3)
    for place, best in enumerate(found.top_logprobs[1:]):
        assert max(best.values()) == pytest.approx(logs[place].max(), abs=1e-3)
    assert all(CALL[offset:].startswith(token) for offset, token in zip(found.text_offset, found.tokens, strict=True))


def test_logprobs_of_what_is_generated(server: Running) -> None:
    """Greedy tokens are the likeliest; a stream tells the same as a whole answer."""
    options = {"model": "toy", "prompt": CALL, "max_tokens": 10, "temperature": 0, "logprobs": 3}
    found = server.client().completions.create(**options).choices[0].logprobs
    for token, logprob, best in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert len(best) == 3
        assert best[token] == logprob == max(best.values())
        assert sum(math.exp(value) for value in best.values()) < 1 + 1e-6
    streamed = [chunk.choices[0].logprobs for chunk in server.client().completions.create(**options, stream=True)]
    assert [token for part in streamed if part for token in part.tokens] == found.tokens
    assert [offset for part in streamed if part for offset in part.text_offset] == found.text_offset


def test_penalties_and_bias_reach_the_sampler(server: Running) -> None:
    (first,) = server.llm.tokenizer.encode(" I")[:1]
    options = {"prompt": CALL, "max_tokens": 1}
    plain = text_of(server, **options)
    assert text_of(server, **options, logit_bias={str(first): 100}) == " I"
    banned = server.llm.tokenizer.encode(plain)[0]
    assert text_of(server, **options, logit_bias={str(banned): -100}) != plain
    long = {"max_tokens": 60, "extra_body": {"ignore_eos": True}}
    prompts = [CALL, "My chest hurts.", "I am 34 years old.", "What is triage?"]
    free = [text_of(server, prompt, **long) for prompt in prompts]
    assert [text_of(server, prompt, presence_penalty=2, **long) for prompt in prompts] != free
    assert [text_of(server, prompt, frequency_penalty=2, **long) for prompt in prompts] != free


def test_an_output_ends_with_the_context(server: Running) -> None:
    prompt = [7] * (server.llm.max_context - 3)
    answer = server.client().completions.create(
        model="toy", prompt=prompt, max_tokens=100, extra_body={"ignore_eos": True}
    )
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 4)


def test_refusals_name_the_field(server: Running) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.client().completions.create(model="toy", prompt="a", n=99)
    assert caught.value.param == "n"
    with pytest.raises(openai.NotFoundError) as missing:
        server.client().completions.create(model="other", prompt="a")
    assert missing.value.code == "model_not_found"
