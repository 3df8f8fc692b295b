"""Outputs that fit a JSON schema or a grammar: masks of allowed tokens, by llguidance."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import llguidance
import numpy as np
import numpy.typing as npt

from angelforge.errors import AngelForgeError
from angelforge.runtime.server.errors import ApiError
from angelforge.runtime.server.schemas import Function
from angelforge.runtime.server.tools import BEGIN, END
from angelforge.runtime.server.vocabulary import Vocabulary

# What may stand between JSON's parts: a blank, or a new line with its indentation. Were any whitespace allowed, a model
# could go on with blanks until its tokens are used up.
_OPTIONS: Any = {"whitespace_flexible": True, "whitespace_pattern": r"( |\n {0,16})?"}
_ON_ONE_LINE: Any = {"whitespace_flexible": True, "whitespace_pattern": " ?"}


class Grammar:
    """A compiled grammar over a vocabulary; `start` gives each request a state of its own."""

    def __init__(self, vocabulary: Vocabulary, source: str, param: str) -> None:
        """Raises ApiError (400) naming the field `param` if the grammar makes no sense or cannot be applied here."""
        if vocabulary.guide is None:
            raise ApiError(400, f"This model cannot be held to a grammar: {vocabulary.problem}.", param)
        failed, told = llguidance.LLMatcher.validate_grammar_with_warnings(source, vocabulary.guide)
        if failed:
            raise ApiError(400, f"{param} cannot be followed: {_reason(told[0])}.", param)
        self._matcher = llguidance.LLMatcher(vocabulary.guide, source, log_level=0)
        self._words = -(-vocabulary.size // 32)
        if problem := _look(self._matcher, np.zeros(self._words, np.uint32)):  # it refers to itself alone, say
            raise ApiError(400, f"{param} cannot be followed: {problem}.", param)

    def start(self) -> Matching:
        """A new output that has to fit."""
        return Matching(self._matcher.deep_copy(), self._words)


class Matching:
    """A `Constraint`: what may come next in one output."""

    def __init__(self, matcher: llguidance.LLMatcher, words: int) -> None:
        self._matcher = matcher
        self._mask: npt.NDArray[np.uint32] = np.zeros(words, np.uint32)
        self._look()

    def mask(self) -> npt.NDArray[np.uint32]:
        """Bit i of word w is set where token 32·w + i may come, uint32 [⌈vocab / 32⌉]; valid until `accept`.

        When the grammar is fulfilled only end tokens may come.
        """
        return self._mask

    def accept(self, token: int) -> None:
        """Notes that a token was chosen, and looks what may follow it.

        Raises AngelForgeError if it was not allowed, or the grammar grows too complex: of this output alone.
        """
        self._matcher.consume_token(token)
        self._look()

    def _look(self) -> None:
        if problem := _look(self._matcher, self._mask):
            raise AngelForgeError(f"The output's grammar cannot be followed: {problem}.")


def _look(matcher: llguidance.LLMatcher, mask: npt.NDArray[np.uint32]) -> str | None:
    """Writes into `mask` what may come next; the reason why nothing can."""
    matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
    if not matcher.is_error():
        return None
    # The first line: the matcher's state follows, with the output's tokens in it.
    line = _reason(matcher.get_error().split("\n", 1)[0])
    if "doesn't satisfy the grammar" in line:  # the token is named
        return "a token came that it does not allow"
    return "nothing that could come fits it" if line == "NoExtensionBias" else line


def json_grammar(schema: Mapping[str, Any]) -> str:
    """JSON that fits a schema. Raises ApiError (400) if the schema makes no sense."""
    with _refused("response_format"):
        return llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_OPTIONS)


def tool_call_grammar(functions: Sequence[Function], special_tags: bool) -> str:
    """One call of one of the functions, between the tags that Ling's templates use, as special tokens or spelt.

    Raises ApiError (400) if parameters make no sense.
    """
    begin, end = (BEGIN, END) if special_tags else (f'"{BEGIN}"', f'"{END}"')
    lines = [f"start: {' | '.join(f'call_{number}' for number in range(len(functions)))}"]
    with _refused("tools"):
        for number, function in enumerate(functions):
            arguments = function.parameters or {"type": "object"}
            schema = {
                "type": "object",
                "properties": {"name": {"const": function.name}, "arguments": arguments},
                "required": ["name", "arguments"],
                "additionalProperties": False,
                "x-guidance": _ON_ONE_LINE,
            }
            lines.append(f'call_{number}: {begin} "\\n" %json {json.dumps(schema)} "\\n" {end}')
        return llguidance.LLMatcher.grammar_from_lark("\n".join(lines))


@contextmanager
def _refused(param: str) -> Iterator[None]:
    """Half characters, and nesting without end, are the sender's error in the field `param`."""
    try:
        yield
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"{param} cannot be followed: {_reason(str(error))}.", param) from None


def _reason(told: str) -> str:
    """The first line, and what the last says where that is the error that the first announces."""
    lines = told.splitlines()
    reason = lines[0].rstrip(".: ")
    if len(lines) > 1 and lines[-1].startswith("error: "):
        reason += ": " + lines[-1].removeprefix("error: ").rstrip(".")
    return reason[:300]
