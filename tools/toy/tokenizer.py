"""Dialogues as token ids, and which of them are the answers that a model is to learn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from angelforge.errors import AngelForgeError
from angelforge.runtime.chat import ChatTemplate
from angelforge.runtime.tokenizer import Tokenizer
from angelforge.tools.toy.grammar import Message


class Encoder:
    """Turns dialogues into token ids in the chat format of a checkpoint folder."""

    def __init__(self, folder: Path) -> None:
        tokenizer, template = Tokenizer.load(folder), ChatTemplate.load(folder)
        if tokenizer is None or template is None:
            raise AngelForgeError(f"{folder} has no tokenizer or no chat template. Write them first.")
        self._tokenizer, self._template = tokenizer, template

    def encode(self, messages: Sequence[Message]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """(ids [n], whether each belongs to an answer [n], the answer's end token included)."""
        ids: list[int] = []
        answer: list[bool] = []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                whole = self._render(messages[:index], True)
                answer += [False] * (len(whole) - len(ids))
                ids = whole
            whole = self._render(messages[: index + 1], False)
            answer += [message["role"] == "assistant"] * (len(whole) - len(ids))
            ids = whole
        return np.array(ids, np.int64), np.array(answer)

    def _render(self, messages: Sequence[Message], open_answer: bool) -> list[int]:
        text = self._template.render(messages, add_generation_prompt=open_answer)
        return self._tokenizer.encode(text, add_special_tokens=False)
