"""POST /v1/chat/completions with OpenAI's own client: conversations, grammars, tools."""

import json
from typing import Any

import openai
import pytest
from support.http_server import Running

from angelforge.runtime.sampling import SamplingParams

COUGH = [{"role": "user", "content": "Hello, I have a cough. I have had it for 4 days. I am 34 years old."}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"days": {"type": "integer", "minimum": 0, "maximum": 9}},
                "required": ["days"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("call", "book")
]


def create(server: Running, **options: Any) -> Any:
    return server.client().chat.completions.create(**{"model": "toy", "messages": COUGH, "temperature": 0} | options)


def joined(chunks: Any) -> tuple[str, list[str | None]]:
    """(content, finish reasons) of a stream of one choice."""
    content, reasons = "", []
    for chunk in chunks:
        content += chunk.choices[0].delta.content or ""
        reasons.append(chunk.choices[0].finish_reason)
    return content, reasons


def test_an_answer_is_what_the_model_says(server: Running) -> None:
    """The checkpoint's template makes the prompt; the answer ends by itself without a limit; parts are joined."""
    answer = create(server)
    prompt = server.llm.chat_prompt(COUGH)
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.role == "assistant"
    text = answer.choices[0].message.content
    assert "cough" in text
    plain = server.client().completions.create(model="toy", prompt=prompt, temperature=0)
    assert plain.choices[0].text == text
    parts = [{"type": "text", "text": part} for part in ("Hello, I have a cough. ", COUGH[0]["content"][23:])]
    assert create(server, messages=[{"role": "user", "content": parts}]).choices[0].message.content == text
    with_developer = create(server, messages=[{"role": "developer", "content": "Be short."}, *COUGH])
    with_system = create(server, messages=[{"role": "system", "content": "Be short."}, *COUGH])
    assert with_developer.choices[0].message == with_system.choices[0].message


def test_a_stream_is_the_whole_answer(server: Running) -> None:
    chunks = list(create(server, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    content, reasons = joined(chunks)
    assert content == create(server).choices[0].message.content
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]
    assert len({chunk.id for chunk in chunks}) == 1


def test_stop_strings_choices_and_limits(server: Running) -> None:
    whole = create(server).choices[0].message.content
    stopped = create(server, stop=["cough"]).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == (whole.split("cough")[0], "stop")
    answer = create(server, n=3, temperature=1.0, seed=5, max_completion_tokens=4)
    assert [choice.finish_reason for choice in answer.choices] == ["length"] * 3
    assert answer.usage.completion_tokens == 12
    assert answer.usage.prompt_tokens == len(server.llm.chat_prompt(COUGH))
    again = create(server, n=3, temperature=1.0, seed=5, max_tokens=4)
    assert [c.message.content for c in again.choices] == [c.message.content for c in answer.choices]


def test_logprobs_of_a_chat(server: Running) -> None:
    answer = create(server, logprobs=True, top_logprobs=2, max_tokens=6).choices[0]
    rows = answer.logprobs.content
    assert len(rows) == 6
    assert b"".join(bytes(row.bytes) for row in rows).decode() == answer.message.content
    for row in rows:
        assert row.top_logprobs[0].token == row.token
        assert len(row.top_logprobs) == 2
    parts = [
        chunk.choices[0].logprobs for chunk in create(server, logprobs=True, top_logprobs=2, max_tokens=6, stream=True)
    ]
    assert [row for part in parts if part for row in part.content] == rows


def test_any_json_object(server: Running) -> None:
    """The toy has never seen JSON: the grammar makes it write some, or at least begin."""
    for seed in range(4):
        answer = create(
            server, temperature=1.0, seed=seed, max_tokens=60, response_format={"type": "json_object"}
        ).choices[0]
        assert answer.message.content.startswith("{")
        if answer.finish_reason == "stop":
            assert isinstance(json.loads(answer.message.content), dict)


def test_json_that_fits_a_schema(server: Running) -> None:
    schema = {
        "type": "object",
        "properties": {
            "urgency": {"enum": ["low", "high"]},
            "days": {"type": "integer", "minimum": 0, "maximum": 30},
            "signs": {"type": "array", "items": {"enum": ["cough", "fever"]}, "maxItems": 2},
        },
        "required": ["urgency", "days", "signs"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "triage", "schema": schema, "strict": True}}
    for seed in range(4):
        options = {"temperature": 1.5, "seed": seed, "response_format": form}
        answer = create(server, **options).choices[0]
        assert answer.finish_reason == "stop"
        value = json.loads(answer.message.content)
        assert sorted(value) == ["days", "signs", "urgency"]
        assert value["urgency"] in ("low", "high")
        assert 0 <= value["days"] <= 30
        assert set(value["signs"]) <= {"cough", "fever"}
        assert joined(create(server, **options, stream=True))[0] == answer.message.content


ITSELF = {"$ref": "#/definitions/a", "definitions": {"a": {"$ref": "#/definitions/a"}}}


@pytest.mark.parametrize(
    "schema", [{"type": "nonsense"}, {"$ref": "#/not/there"}, {"type": "object", "not": {}}, ITSELF]
)
def test_schemas_that_cannot_be_followed_are_refused(server: Running, schema: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        create(server, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    assert caught.value.param == "response_format"
    assert "\n" not in caught.value.message
    assert "Parser" not in caught.value.message


def test_a_call_that_must_be_made(tool_server: Running) -> None:
    """A certain function, or any: the model writes the tags, and the answer holds the call instead of text."""
    for choice in ("required", {"type": "function", "function": {"name": "book"}}):
        answer = create(tool_server, tools=TOOLS, tool_choice=choice, seed=1, temperature=1.0).choices[0]
        assert answer.finish_reason == "tool_calls"
        (call,) = answer.message.tool_calls
        assert call.function.name in (["book"] if choice != "required" else ["book", "call"])
        arguments = json.loads(call.function.arguments)
        assert 0 <= arguments["days"] <= 9
        assert not answer.message.content


def test_calls_in_a_stream(tool_server: Running) -> None:
    options = {"tools": TOOLS, "tool_choice": "required", "seed": 3, "temperature": 1.0}
    whole = create(tool_server, **options).choices[0].message.tool_calls[0].function
    chunks = list(create(tool_server, **options, stream=True))
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert [(call.index, call.function.name, call.function.arguments) for call in calls] == [
        (0, whole.name, whole.arguments)
    ]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert joined(chunks)[0] == ""


def test_tools_are_told_and_answers_go_back(tool_server: Running) -> None:
    """The template sees the tools unless none may be called, and calls and results of earlier turns."""
    plain = create(tool_server).usage.prompt_tokens
    assert create(tool_server, tools=TOOLS, tool_choice="none").usage.prompt_tokens == plain
    assert create(tool_server, tools=TOOLS[:1], max_tokens=4).usage.prompt_tokens > plain
    called = {"id": "call_1", "type": "function", "function": {"name": "book", "arguments": '{"days": 3}'}}
    turns = [
        *COUGH,
        {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "call_1", "content": "Booked."},
    ]
    answer = create(tool_server, messages=turns, max_tokens=4)
    parsed = {"name": "book", "arguments": {"days": 3}}
    text = tool_server.llm.template.render(
        [
            *COUGH,
            {"role": "assistant", "content": "", "tool_calls": [{"function": parsed}]},
            turns[2],
        ]
    )
    assert '"arguments": {"days": 3}}\n</tool_call>' in text
    assert answer.usage.prompt_tokens == len(tool_server.llm.tokenizer.encode(text, add_special_tokens=False))


def test_a_template_without_tools_refuses_them(server: Running) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        create(server, tools=TOOLS)
    assert caught.value.param == "tools"
    assert create(server, tools=TOOLS, tool_choice="none", max_tokens=2).choices
    with pytest.raises(openai.BadRequestError):
        create(server, tool_choice="required")


def test_the_whole_context_is_the_limit(server: Running) -> None:
    """Without max_tokens an answer may take what is left of the context."""
    answer = create(server, extra_body={"ignore_eos": True}, temperature=1.0, seed=1)
    assert answer.usage.total_tokens == server.llm.max_context
    assert answer.choices[0].finish_reason == "length"
    assert SamplingParams().max_tokens < answer.usage.completion_tokens
