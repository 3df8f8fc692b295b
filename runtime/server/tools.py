"""Tool calls in a model's text, as Ling's chat templates have it write them: <tool_call>{json}</tool_call>."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from angelforge.runtime.detokenizer import Detokenizer
from angelforge.runtime.stops import StopFilter
from angelforge.runtime.tokenizer import Tokenizer

BEGIN, END = "<tool_call>", "</tool_call>"


class TaggedText:
    """The text of an output with the tags in it, also where they are special tokens, which texts leave out."""

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...]) -> None:
        """`stops` are the request's stop strings."""
        self._detokenizer, self._filter = Detokenizer(tokenizer), StopFilter(stops)
        self._tags = {tokenizer.special_id(tag): tag for tag in (BEGIN, END)}

    def push(self, tokens: Iterable[int]) -> str:
        """The text to show after more tokens."""
        text = ""
        for token in tokens:
            tag = self._tags.get(token)
            text += self._detokenizer.push(token) if tag is None else self._detokenizer.finish() + tag
        return self._filter.push(text)

    def finish(self) -> str:
        """What was held back."""
        return self._filter.push(self._detokenizer.finish()) + self._filter.finish()


@dataclass(frozen=True)
class Call:
    """A function that the model wants called; `arguments` is JSON in a text."""

    name: str
    arguments: str
    id: str

    def to_dict(self) -> dict[str, Any]:
        """As in an answer of the API."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


class ToolCallParser:
    """Splits streamed text into content and calls; the pieces together do not depend on how the text was cut.

    Blanks around calls are dropped. What stands between tags but is no call (no JSON object with a name and arguments)
    stays content, tags included.
    """

    def __init__(self) -> None:
        self._held = ""  # not decided yet: blanks, the begin of a tag, or a call that is not complete
        self._called = False

    def push(self, text: str) -> tuple[str, list[Call]]:
        """(content, calls) that are certain after `text`."""
        self._held += text
        content, calls = "", []
        while True:
            begin = self._held.find(BEGIN)
            if begin < 0:
                break
            end = self._held.find(END, begin)
            if end < 0:
                break
            inside, whole = self._held[begin + len(BEGIN) : end], self._held[: end + len(END)]
            self._held = self._held[len(whole) :]
            call = parse_call(inside)
            if call is None:
                content += whole
            else:
                content += whole[:begin].rstrip()
                calls.append(call)
                self._called = True
        keep = self._certain() if begin < 0 else len(self._held[:begin].rstrip())
        content, self._held = content + self._held[:keep], self._held[keep:]
        return content, calls

    def finish(self) -> str:
        """The rest of the content: no more text comes."""
        held, self._held = self._held, ""
        return "" if self._called and not held.strip() else held

    def _certain(self) -> int:
        """How much of what is held is neither blanks at the end nor the begin of a tag."""
        for begin in range(max(0, len(self._held) - len(BEGIN) + 1), len(self._held)):
            if BEGIN.startswith(self._held[begin:]):
                return len(self._held[:begin].rstrip())
        return len(self._held.rstrip())


def parse_call(text: str) -> Call | None:
    """A call as models write it, None if it is none: {"name": …, "arguments": {…}}."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return Call(value["name"], arguments, f"call_{secrets.token_hex(12)}")
