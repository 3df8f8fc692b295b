"""`LLM`: prompts in, outputs out, each prompt by itself; on a tiny engine in NumPy."""

import json

import numpy as np
import pytest
from support.paged_engine import PagedEngine
from support.tokenizers import byte_level

from angelforge import LLM, SamplingParams
from angelforge.errors import AngelForgeError, UsageError
from angelforge.runtime.chat import ChatTemplate

TOKENIZER = byte_level()
VOCAB = 270
TEMPLATE = ChatTemplate("{% for message in messages %}{{ message.role }}:{{ message.content }}\n{% endfor %}", {})


def load(tokenizer=TOKENIZER, template=TEMPLATE, eos=(), max_context=64, num_pages=64, **options):
    engine = PagedEngine(4, num_pages, max_context, VOCAB, eos)
    return LLM.from_engine(engine, tokenizer, template, **options)


def greedy(prompt, count, max_context=64):
    """Token by token without cache."""
    engine, known = PagedEngine(4, 2, max_context, VOCAB), list(prompt)
    for _ in range(count):
        known.append(int(engine.dense_logits(np.array(known)).argmax()))
    return tuple(known[len(prompt) :])


def test_outputs_come_in_the_order_of_the_prompts_whatever_ends_first():
    prompts = [[5, 6, 7], "abc", [9] * 30]
    params = [SamplingParams(max_tokens=n) for n in (9, 1, 4)]
    outputs = load().generate(prompts, params)
    for output, prompt, one in zip(outputs, prompts, params, strict=True):
        ids = TOKENIZER.encode(prompt) if isinstance(prompt, str) else prompt
        assert output.prompt_token_ids == tuple(ids)
        assert output.token_ids == greedy(ids, one.max_tokens)
        assert output.text == TOKENIZER.decode(list(output.token_ids))
        assert (output.finish_reason, output.error) == ("length", None)
        assert 0 < output.timings.first_token <= output.timings.total


def test_streamed_deltas_add_up_to_the_outputs():
    llm, prompts = load(), [[5], [6, 7]]
    texts, tokens, outputs = ["", ""], [(), ()], {}
    for delta in llm.stream(prompts, SamplingParams(max_tokens=20, temperature=1.0, seed=1)):
        assert delta.index not in outputs
        texts[delta.index] += delta.text
        tokens[delta.index] += delta.token_ids
        if delta.output:
            outputs[delta.index] = delta.output
    assert [outputs[i].text for i in (0, 1)] == texts
    assert [outputs[i].token_ids for i in (0, 1)] == tokens


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt is empty"),
        ("", "prompt is empty"),
        ([1, VOCAB], "Token 1 of the prompt has id 270, but the model's ids are 0 to 269"),
        ([-1], "has id -1"),
        ([2**70], "more than 64 bits"),
        ([1] * 65, "prompt has 65 tokens, but the context is 64"),
        ([1, "2"], "a text or a list of token ids"),
        ([True], "a text or a list of token ids"),
        ([1.0], "a text or a list of token ids"),
        (7, "A prompt is a int"),
        (None, "A prompt is a NoneType"),
        (np.zeros((2, 2), np.int64), "a text or a list of token ids"),
        ("a\udcff", "not valid Unicode"),
    ],
)
def test_a_bad_prompt_is_told_and_leaves_the_others_alone(prompt, message):
    bad, good = load().generate([prompt, [5, 6]], SamplingParams(max_tokens=3))
    assert bad.finish_reason == "error"
    assert message in bad.error
    assert (bad.text, bad.token_ids) == ("", ())
    assert good.token_ids == greedy([5, 6], 3)


def test_a_prompt_that_can_never_fit_the_cache_is_told_and_leaves_the_others_alone():
    bad, good = load(num_pages=5).generate([[1] * 15, [5, 6]], SamplingParams(max_tokens=3))
    assert "prompt has 15 tokens and up to 3 are to follow, but the KV cache holds 16" in bad.error
    assert good.token_ids == greedy([5, 6], 3)


def test_more_prompts_than_fit_at_once_all_finish():
    prompts = [[i, i + 1, i + 2] for i in range(40)]
    outputs = load(num_pages=9, max_batch=3).generate(prompts, SamplingParams(max_tokens=6))
    assert [output.token_ids for output in outputs] == [greedy(prompt, 6) for prompt in prompts]


def test_output_ends_at_the_end_of_the_context():
    """The last position yields a token, which is not computed on."""
    for size, count in ((60, 5), (64, 1)):
        (output,) = load().generate([[3] * size], SamplingParams(max_tokens=99))
        assert output.token_ids == greedy([3] * size, count)
        assert output.finish_reason == "length"


def test_any_of_the_models_end_tokens_ends_the_output_unless_ignored():
    wanted = greedy([5], 8)
    for position in (0, 3):
        llm = load(eos=(VOCAB - 1, wanted[position]))
        (output,) = llm.generate([[5]], SamplingParams(max_tokens=8))
        first = wanted.index(wanted[position])
        assert (output.token_ids, output.finish_reason) == (wanted[: first + 1], "stop")
        assert output.text == TOKENIZER.decode(list(wanted[:first]))
        (output,) = llm.generate([[5]], SamplingParams(max_tokens=8, ignore_eos=True))
        assert (output.token_ids, output.finish_reason) == (wanted, "length")


def test_stop_token_ids_end_the_output_also_where_end_tokens_are_ignored():
    wanted = greedy([5], 8)
    params = SamplingParams(max_tokens=8, stop_token_ids=(wanted[2],), ignore_eos=True)
    (output,) = load().generate([[5]], params)
    assert output.token_ids == wanted[: wanted.index(wanted[2]) + 1]
    assert output.finish_reason == "stop"


def test_the_last_token_can_be_an_end_token():
    wanted = greedy([5], 1)
    (output,) = load(eos=wanted).generate([[5]], SamplingParams(max_tokens=1))
    assert output.finish_reason == "stop"


def test_a_stop_string_across_tokens_ends_the_text_before_it():
    llm = load()
    llm._engine.head[:, 94:] = 0  # letters only: each token is one
    (whole,) = llm.generate(["xy"], SamplingParams(max_tokens=30))
    stop = whole.text[10:13]
    (output,) = llm.generate(["xy"], SamplingParams(max_tokens=30, stop=stop))
    shown = "".join(delta.text for delta in llm.stream(["xy"], SamplingParams(max_tokens=30, stop=stop)))
    assert shown == output.text == whole.text.split(stop)[0]
    assert output.finish_reason == "stop"
    assert output.token_ids == whole.token_ids[: len(output.text) + 3]


def test_a_stop_string_that_is_a_special_token_is_found_by_its_id():
    mark = TOKENIZER.special_id("<|mark|>")
    llm = load()
    llm._engine.head[:, mark] = 0
    llm._engine.head[:, mark] = llm._engine.head.sum(1) * 100
    outputs = llm.generate(["abc", "xyz", "123", "?!"], SamplingParams(max_tokens=5, stop=("<|mark|>",)))
    assert "stop" in {output.finish_reason for output in outputs}
    assert all((mark in output.token_ids) == (output.finish_reason == "stop") for output in outputs)


def test_seeds_decide_the_output_and_params_are_for_each_prompt():
    llm, prompts = load(), [[5, 6]] * 4
    params = [SamplingParams(max_tokens=12, temperature=20.0, seed=seed) for seed in (1, 2, 1, 3)]
    first, second, third, fourth = (output.token_ids for output in llm.generate(prompts, params))
    assert first == third
    assert len({first, second, fourth}) == 3
    assert llm.generate([[5, 6]], params[0])[0].token_ids == first
    unseeded = SamplingParams(max_tokens=12, temperature=20.0)
    assert len({output.token_ids for output in llm.generate(prompts, unseeded)}) == 4


def test_a_model_without_tokenizer_takes_and_gives_ids():
    llm = load(tokenizer=None, template=None)
    ids, text, stop = llm.generate([[5], "text", [5]], [SamplingParams(max_tokens=2)] * 2 + [SamplingParams(stop="x")])
    assert (ids.token_ids, ids.text) == (greedy([5], 2), "")
    assert "no tokenizer" in text.error
    assert "no tokenizer" in stop.error
    with pytest.raises(UsageError, match="no tokenizer"):
        llm.chat([{"role": "user", "content": "x"}])


def test_chat_answers_a_conversation():
    messages = [{"role": "user", "content": "Hi"}]
    output = load().chat(messages, SamplingParams(max_tokens=4))
    ids = TOKENIZER.encode("user:Hi\n")
    assert output.prompt_token_ids == tuple(ids)
    assert output.token_ids == greedy(ids, 4)


def test_a_chat_that_cannot_be_run_raises():
    with pytest.raises(AngelForgeError, match="but the context is 64"):
        load().chat([{"role": "user", "content": "Hi" * 50}])
    with pytest.raises(UsageError, match="no chat template"):
        load(template=None).chat([{"role": "user", "content": "x"}])


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_scores_are_the_logits_at_every_position(step):
    ids = np.random.default_rng(0).integers(0, VOCAB, 23)
    llm = load(max_batch=1, max_tokens_per_step=step)
    wanted = [llm._engine.dense_logits(ids[: n + 1]) for n in range(23)]
    np.testing.assert_array_equal(llm.score(ids.tolist()), wanted)
    assert llm.score("x").shape == (1, VOCAB)
    assert llm.stepper.scheduler.pool.free == 63


def test_scores_that_cannot_be_computed_raise():
    with pytest.raises(UsageError, match="prompt is empty"):
        load().score([])
    with pytest.raises(UsageError, match="prompt has 33 tokens, but the KV cache has room for 32"):
        load(num_pages=9).score([1] * 33)


def test_an_unfinished_score_is_told_where_it_leaves_no_room():
    llm = load(num_pages=9, max_batch=1, max_tokens_per_step=4)
    pieces = llm.score_pieces([1] * 32)
    next(pieces)
    with pytest.raises(AngelForgeError, match="in use by a `score_pieces`"):
        llm.generate([[1]], SamplingParams(max_tokens=2))
    pieces.close()
    assert llm.generate([[5]], SamplingParams(max_tokens=2))[0].token_ids == greedy([5], 2)


def test_closing_a_stream_cancels_and_frees_its_requests():
    llm = load(max_batch=2)
    stream = llm.stream([[1], [2], [3]], SamplingParams(max_tokens=30))
    next(stream)
    stream.close()
    scheduler = llm.stepper.scheduler
    assert (list(scheduler.running), list(scheduler.waiting), scheduler.pool.free) == ([], [], 63)


def test_two_streams_can_be_read_in_turns():
    llm, params = load(), SamplingParams(max_tokens=9)
    results = [[], []]
    for pair in zip(llm.stream([[5]], params), llm.stream([[6, 7]], params), strict=True):
        for result, delta in zip(results, pair, strict=True):
            result.extend(delta.token_ids)
    assert [tuple(result) for result in results] == [greedy([5], 9), greedy([6, 7], 9)]


def test_a_failing_engine_is_an_error_of_the_requests_it_was_running():
    llm = load(max_batch=1)
    llm._engine.fail_with = "The device was lost."
    failed, fine = llm.generate([[1], [5]], SamplingParams(max_tokens=2))
    assert (failed.finish_reason, failed.error) == ("error", "The device was lost.")
    assert fine.token_ids == greedy([5], 2)


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ("one text", None, "prompts is a str"),
        (5, None, "prompts is a int"),
        ([[1]], [SamplingParams()] * 2, "list of 1"),
        ([[1]], [None], "list of 1"),
        ([[1]], {"max_tokens": 3}, "list of 1"),
    ],
)
def test_wrong_arguments_raise_before_anything_runs(prompts, params, message):
    with pytest.raises(UsageError, match=message):
        load().generate(prompts, params)


def test_no_prompts_give_no_outputs():
    assert load().generate([]) == []


def test_a_closed_llm_says_so():
    with load() as llm:
        engine = llm._engine
    assert engine.closed
    llm.close()
    for use in (lambda: llm.generate([[1]]), lambda: llm.score([1])):
        with pytest.raises(UsageError, match="closed"):
            use()


def test_outputs_are_json():
    (output,) = load().generate([[5]], SamplingParams(max_tokens=2))
    saved = json.loads(json.dumps(output.to_dict()))
    assert saved["token_ids"] == list(output.token_ids)
    names = {"text", "token_ids", "prompt_token_ids", "finish_reason", "error", "timings", "speculation"}
    names |= {"logprobs", "prompt_logprobs", "cached_tokens"}
    assert set(saved) == names
