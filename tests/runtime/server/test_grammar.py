"""Masks over the toy's tokens: what they allow is what the grammar says, and nothing else."""

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from angelforge.errors import AngelForgeError
from angelforge.runtime.constraint import allowed_ids
from angelforge.runtime.server.errors import ApiError
from angelforge.runtime.server.grammar import Grammar, json_grammar, tool_call_grammar
from angelforge.runtime.server.schemas import Function
from angelforge.runtime.server.tools import BEGIN, END, TaggedText, ToolCallParser
from angelforge.runtime.server.vocabulary import Vocabulary
from angelforge.runtime.tokenizer import Tokenizer
from angelforge.tools.toy import MODEL


class Model:
    """As much of an LLM as a vocabulary needs; it has more ids than its tokenizer knows."""

    def __init__(self, *special: str) -> None:
        library = tokenizers.Tokenizer.from_file(str(MODEL / "tokenizer.json"))
        library.add_special_tokens(list(special))
        self.tokenizer = Tokenizer(library)
        self.config = type("Config", (), {"vocab_size": 1100, "eos_token_ids": (1, 2)})


VOCABULARY = Vocabulary(Model())
MODELS = {False: Model(), True: Model(BEGIN, END)}  # with the tags of calls as special tokens, too
VOCABULARIES = {special: Vocabulary(model) for special, model in MODELS.items()}


def walk(grammar: Grammar, seed: int, special: bool = False) -> str:
    """Text of random allowed tokens until the grammar ends it."""
    rng, matching, ids = np.random.default_rng(seed), grammar.start(), []
    for _ in range(400):
        allowed = np.flatnonzero(allowed_ids(matching.mask(), VOCABULARY.size))
        assert allowed.size
        assert allowed.max() < 1024 + 2 * special  # what the tokenizer does not know never comes
        token = int(rng.choice(allowed))
        if token in (1, 2):
            text = TaggedText(MODELS[special].tokenizer, ())
            return text.push(ids) + text.finish()
        matching.accept(token)
        ids.append(token)
    raise AssertionError("the grammar does not end")


@given(st.integers(0, 10**6))
def test_whatever_is_allowed_fits_the_schema(seed: int) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["x", "yes"]}, "b": {"type": "integer", "minimum": 3, "maximum": 40}},
        "required": ["a"],
        "additionalProperties": False,
    }
    text = walk(Grammar(VOCABULARY, json_grammar(schema), "schema"), seed)
    value = json.loads(text)
    assert value["a"] in ("x", "yes")
    assert 3 <= value.get("b", 3) <= 40
    assert set(value) <= {"a", "b"}


@given(st.integers(0, 10**6), st.booleans())
def test_a_call_is_one_that_the_parser_finds(seed: int, special: bool) -> None:
    """Also where the tags are special tokens: the model writes these then."""
    functions = [
        Function(name=name, parameters={"type": "object", "properties": {"n": {"type": "boolean"}}, "required": ["n"],
                                        "additionalProperties": False})
        for name in ("first", "second")
    ]  # fmt: skip
    text = walk(Grammar(VOCABULARIES[special], tool_call_grammar(functions, special), "tools"), seed, special)
    content, (call,) = ToolCallParser().push(text)
    assert content == ""
    assert call.name in ("first", "second")
    assert list(json.loads(call.arguments)) == ["n"]


def test_both_end_tokens_are_allowed_at_the_end_and_none_before() -> None:
    matching = Grammar(VOCABULARY, json_grammar({"const": 7}), "schema").start()
    before = allowed_ids(matching.mask(), VOCABULARY.size)
    assert not before[1]
    assert not before[2]
    matching.accept(VOCABULARY.guide.tokenize_str("7")[0])
    assert np.flatnonzero(allowed_ids(matching.mask(), VOCABULARY.size)).tolist() == [1, 2]


def test_states_are_each_outputs_own() -> None:
    grammar = Grammar(VOCABULARY, json_grammar({"type": "array"}), "schema")
    first, second = grammar.start(), grammar.start()
    before = second.mask().copy()
    first.accept(VOCABULARY.guide.tokenize_str("[")[0])
    assert np.array_equal(second.mask(), before)
    assert not np.array_equal(first.mask(), before)


def test_what_is_not_allowed_is_an_error_of_that_output() -> None:
    """And is not named in it."""
    matching = Grammar(VOCABULARY, json_grammar({"type": "object"}), "schema").start()
    with pytest.raises(AngelForgeError, match=r"grammar cannot be followed: a token came that it does not allow\.$"):
        matching.accept(VOCABULARY.guide.tokenize_str("]")[0])


def test_what_cannot_go_on_is_told_without_the_output() -> None:
    itself = {"$ref": "#/definitions/a"}
    schema = {"type": "object", "properties": {"b": itself}, "required": ["b"], "definitions": {"a": itself}}
    matching = Grammar(VOCABULARY, json_grammar(schema | {"additionalProperties": False}), "schema").start()

    def write(text: str) -> None:
        for token in VOCABULARY.guide.tokenize_str(text):
            matching.accept(token)

    with pytest.raises(AngelForgeError, match=r"grammar cannot be followed: nothing that could come fits it\.$"):
        write('{"b":')


ITSELF = {"$ref": "#/definitions/a", "definitions": {"a": {"$ref": "#/definitions/a"}}}


@pytest.mark.parametrize(
    "schema", [{"type": "nothing"}, {"allOf": 3}, {"$ref": "#/not/there"}, {"pattern": "("}, ITSELF]
)
def test_schemas_that_make_no_sense(schema: dict[str, object]) -> None:
    with pytest.raises(ApiError) as caught:
        Grammar(VOCABULARY, json_grammar({"type": "string"} | schema), "schema").start()
    assert caught.value.status == 400
