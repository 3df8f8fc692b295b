"""What is asked: the lines of a dataset, or random tokens of given lengths."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from angelforge.errors import AngelForgeError, UsageError

#: Fields that are asked, the first that a line has: chats; GSM8K; MATH-500; HumanEval.
FIELDS = ("messages", "question", "problem", "prompt")


@dataclass(frozen=True)
class Ask:
    """One request: a chat, a text or token ids, and how long its output may be."""

    messages: tuple[Mapping[str, Any], ...] = ()
    text: str | None = None
    ids: tuple[int, ...] = ()
    max_tokens: int = 128
    ignore_eos: bool = False


def read_dataset(path: Path, max_tokens: int, raw: bool) -> list[Ask]:
    """The lines of a JSONL file; texts become chats of one message unless `raw`.

    Raises UsageError naming the line that has none of the fields.
    """
    found = []
    try:
        # Not splitlines(): a text in JSON may hold U+2028 and U+0085 as they are. Windows begins files with a mark.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise AngelForgeError(f"{path} is not UTF-8 text. A file of JSON lines is expected.") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            found.append(_ask(line, f"{path}, line {number}", max_tokens, raw))
    if not found:
        raise UsageError(f"{path} has no lines. Each is to be a JSON object with one of {', '.join(FIELDS)}.")
    return found


def _ask(line: str, place: str, max_tokens: int, raw: bool) -> Ask:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise UsageError(f"{place} is not valid JSON.") from None
    field = next((name for name in FIELDS if isinstance(value, dict) and name in value), None)
    if field is None:
        raise UsageError(f"{place} has none of the fields {', '.join(FIELDS)}.")
    content = value[field]
    if field == "messages":
        if not isinstance(content, list) or not all(isinstance(message, dict) for message in content) or not content:
            raise UsageError(f"{place}: messages is not a list of objects.")
        return Ask(messages=tuple(content), max_tokens=max_tokens)
    if not isinstance(content, str):
        raise UsageError(f"{place}: {field} is not a text.")
    if raw:
        return Ask(text=content, max_tokens=max_tokens)
    return Ask(messages=({"role": "user", "content": content},), max_tokens=max_tokens)


def synthetic(count: int, input_tokens: int, output_tokens: int, vocab_size: int, seed: int) -> list[Ask]:
    """Random ids, each list another, and outputs of exactly so many tokens."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(min(100, vocab_size // 2), vocab_size, (count, input_tokens)).tolist()
    return [Ask(ids=tuple(row), max_tokens=output_tokens, ignore_eos=True) for row in ids]
