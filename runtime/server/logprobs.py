"""Log probabilities in the two forms that OpenAI's API has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from angelforge.runtime.request import TokenLogprob
from angelforge.runtime.server.vocabulary import Vocabulary

_NEVER = -9999.0  # JSON has no infinity


class CompletionLogprobs:
    """The columns of /v1/completions; offsets count on from part to part of a streamed choice."""

    def __init__(self, vocabulary: Vocabulary, top: int) -> None:
        self._vocabulary, self._top = vocabulary, top
        self._offset = 0

    def columns(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprob | None]) -> dict[str, Any]:
        """The next tokens; a prompt's first has no probability."""
        columns: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, found in zip(tokens, logprobs, strict=True):
            text = self._vocabulary.text(token)
            columns["tokens"].append(text)
            columns["token_logprobs"].append(None if found is None else _finite(found.logprob))
            columns["top_logprobs"].append(None if found is None or not self._top else self._best(found))
            columns["text_offset"].append(self._offset)
            self._offset += 0 if token in self._vocabulary.special_ids else len(text)  # the text leaves these out
        return columns

    def _best(self, found: TokenLogprob) -> dict[str, float]:
        best: dict[str, float] = {}
        # Different ids can be written alike: the most probable one, which comes first, stands for them.
        for token, logprob in (*found.top, (found.token, found.logprob)):
            best.setdefault(self._vocabulary.text(token), _finite(logprob))
        return best


def chat_logprobs(vocabulary: Vocabulary, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    """The rows of /v1/chat/completions."""

    def row(token: int, logprob: float) -> dict[str, Any]:
        raw = vocabulary.bytes(token)
        return {"token": vocabulary.text(token), "logprob": _finite(logprob), "bytes": list(raw)}

    content = [
        row(found.token, found.logprob) | {"top_logprobs": [row(token, value) for token, value in found.top]}
        for found in logprobs
    ]
    return {"content": content, "refusal": None}


def _finite(logprob: float) -> float:
    return max(logprob, _NEVER)
