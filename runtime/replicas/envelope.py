"""A request and the beginning of its answer on their way between gateway and replica."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_SHARED = 256  # characters of a completion's prompt that decide where it goes: about a page of tokens

Headers = tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True)
class Envelope:
    """An HTTP request, read to its end."""

    method: str
    path: str
    query: bytes
    headers: Headers  # names in lower case
    body: bytes
    prefix: str  # prompts that begin alike have the same one, and should meet in one replica's cache; "" for none


@dataclass(frozen=True)
class Head:
    """Status and headers of an answer; its body follows."""

    status: int
    headers: Headers


def prefix_of(body: bytes) -> str:
    """What the prompts of a conversation, or of one task, have in common at their begin.

    Of a chat the system message and the first question, which all of its turns repeat; of a completion its first
    characters or token ids. "" where there is nothing to see: the replica says what is wrong with such a body.
    """
    try:
        request: Any = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    if not isinstance(request, Mapping):
        return ""
    messages = request.get("messages")
    if isinstance(messages, list):
        first = next((i for i, message in enumerate(messages) if _role(message) == "user"), len(messages) - 1)
        return json.dumps(messages[: first + 1])
    prompt = request.get("prompt", "")
    return prompt[:_SHARED] if isinstance(prompt, str) else json.dumps(prompt)[:_SHARED]


def _role(message: object) -> object:
    return message.get("role") if isinstance(message, Mapping) else None
