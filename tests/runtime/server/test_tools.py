"""Calls are found in text however it is cut."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from angelforge.runtime.detokenizer import TextStream
from angelforge.runtime.server.tools import BEGIN, END, TaggedText, ToolCallParser, parse_call
from angelforge.runtime.tokenizer import Tokenizer
from angelforge.tools.toy import MODEL

CALL = f'{BEGIN}\n{{"name": "f", "arguments": {{"a": "1 < 2"}}}}\n{END}'
PARTS = st.lists(st.sampled_from([CALL, BEGIN, END, "<tool", "_call>", "<", " ", "\n", "text", "{}"]), max_size=8)


def parsed(pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    parser, content, calls = ToolCallParser(), "", []
    for piece in pieces:
        new, found = parser.push(piece)
        content += new
        calls += [(call.name, call.arguments) for call in found]
    return content + parser.finish(), calls


@given(PARTS, st.lists(st.integers(0, 200), max_size=12))
def test_cuts_change_nothing(parts: list[str], cuts: list[int]) -> None:
    text = "".join(parts)
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    assert parsed([text[a:b] for a, b in pairwise(places)]) == parsed([text])


@given(PARTS)
def test_text_without_calls_stays(parts: list[str]) -> None:
    text = "".join(part for part in parts if part != CALL)
    content, calls = parsed([text])
    assert (content, calls) == (text, [])


def test_calls_are_taken_out() -> None:
    content, calls = parsed([f"Let me see. {CALL}\n{CALL} "])
    assert content == "Let me see."
    assert calls == [("f", '{"a": "1 < 2"}')] * 2


def test_nothing_certain_is_held_back() -> None:
    parser = ToolCallParser()
    assert parser.push("a < b") == ("a < b", [])
    assert parser.push(" and <tool")[0] == " and"
    assert parser.push("s")[0] == " <tools"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"name": 3}', '{"name": "f"', "[" * 100_000])
def test_what_is_no_call(text: str) -> None:
    assert parse_call(text) is None
    assert parsed([f"{BEGIN}{text}{END}"]) == (f"{BEGIN}{text}{END}", [])


def test_arguments_are_text_of_json() -> None:
    for written in ('{"name": "f", "arguments": "{\\"a\\": 1}"}', '{"name": "f", "arguments": {"a": 1}}'):
        call = parse_call(written)
        assert call is not None
        assert json.loads(call.arguments) == {"a": 1}
    assert parse_call('{"name": "f"}').arguments == "{}"


@given(st.lists(st.integers(0, 1023), max_size=60), st.lists(st.text("ae. ", min_size=1, max_size=2), max_size=2))
def test_without_tags_the_text_is_the_requests(tokens: list[int], stops: list[str]) -> None:
    """Read anew from the tokens, and cut at the same stop string."""
    tokenizer = Tokenizer.load(MODEL)
    stream, tagged = TextStream(tokenizer, tuple(stops)), TaggedText(tokenizer, tuple(stops))
    expected = "".join(map(stream.push, tokens)) + stream.finish()
    assert tagged.push(tokens[:20]) + tagged.push(tokens[20:]) + tagged.finish() == expected
