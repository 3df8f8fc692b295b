"""One request: what was asked, how far it is, and what came out."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from angelforge.runtime.batch import Int64
from angelforge.runtime.detokenizer import TextStream
from angelforge.runtime.pages import Lease
from angelforge.runtime.sampling import SamplingParams
from angelforge.runtime.tally import SpeculationReport, Tally

#: stop: an end token or stop string came; length: max_tokens or the end of the context; error: `RequestOutput.error`.
FinishReason = Literal["stop", "length", "error", "cancelled"]


@dataclass(frozen=True)
class Timings:
    """Seconds since the request was handed in; None for what did not happen."""

    first_token: float | None
    total: float


@dataclass(frozen=True)
class RequestOutput:
    """The result of one prompt.

    `text` leaves out the end token, special tokens and a stop string; `token_ids` has everything that was generated,
    the end token included.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_token_ids: tuple[int, ...]
    finish_reason: FinishReason
    error: str | None  # a sentence for finish_reason "error", else None
    timings: Timings
    speculation: SpeculationReport | None = None  # what a draft did for it, None where none was used

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Delta:
    """A piece of a streamed output: what is new since the last one; the last has `output`."""

    index: int  # of the prompt
    text: str  # may be empty: text is held back until it cannot be half a character or the begin of a stop string
    token_ids: tuple[int, ...]
    output: RequestOutput | None = None


class Request:
    """The state of one prompt from its submission to its end.

    `tokens[:length]` are the known tokens (prompt and output), `tokens[:computed]` those in the KV cache: a step
    computes some of the others, and one that reaches `length` yields the next token. That is all there is to prefill,
    chunked prefill and decode. What is new for the caller goes to `outbox`; the last delta has the output.
    """

    def __init__(
        self,
        index: int,
        prompt: Int64,
        params: SamplingParams,
        max_length: int,
        outbox: deque[Delta],
        end_ids: frozenset[int] = frozenset(),
        text: TextStream | None = None,
    ) -> None:
        """`max_length`, above the prompt's, is where the output ends; without `text` it has token ids only."""
        self.index = index
        self.params = params
        self.prompt_length = prompt.shape[0]
        self.max_length = max_length
        self.end_ids = end_ids
        self.tokens = np.empty(max_length, np.int64)
        self.tokens[: self.prompt_length] = prompt
        self.length = self.prompt_length
        self.computed = 0
        self.lease: Lease | None = None  # held while running
        self.proposed: tuple[int, ...] = ()  # tokens that a draft expects next; the next step checks them
        self.tally: Tally | None = None  # of speculation
        self.rng = np.random.default_rng(params.seed)
        self.outbox = outbox
        self.finished = False
        self._text = text
        self._pieces: list[str] = []
        self._begin = time.perf_counter()
        self._first_token: float | None = None

    @property
    def known(self) -> Int64:
        """Prompt and output so far, int64 [length]."""
        return self.tokens[: self.length]

    def accept(self, token: int) -> None:
        """Appends a generated token and ends the request if it is the last."""
        if self._first_token is None:
            self._first_token = time.perf_counter() - self._begin
        self.tokens[self.length] = token
        self.length += 1
        reason: FinishReason | None = "length" if self.length == self.max_length else None
        text = ""
        if token in self.end_ids:
            reason = "stop"
        elif self._text is not None:
            text = self._text.push(token)
            reason = "stop" if self._text.stopped else reason
        self._emit(text, (token,), reason)

    def end(self, reason: FinishReason, error: str | None = None) -> None:
        """Ends the request before its time; one that has ended stays as it is."""
        if not self.finished:
            self._emit("", (), reason, error)

    def _emit(self, text: str, ids: tuple[int, ...], reason: FinishReason | None, error: str | None = None) -> None:
        if reason is None:
            self._pieces.append(text)
            self.outbox.append(Delta(self.index, text, ids))
            return
        self.finished = True
        if self._text is not None:
            text += self._text.finish()
        self._pieces.append(text)
        prompt, output = self.known[: self.prompt_length].tolist(), self.known[self.prompt_length :].tolist()
        result = RequestOutput(
            text="".join(self._pieces),
            token_ids=tuple(output),
            prompt_token_ids=tuple(prompt),
            finish_reason=reason,
            error=error,
            timings=Timings(self._first_token, time.perf_counter() - self._begin),
            speculation=None if self.tally is None else self.tally.report(),
        )
        self.outbox.append(Delta(self.index, text, ids, result))
