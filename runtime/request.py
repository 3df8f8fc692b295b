"""One request: what was asked, how far it is, and what came out."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from angelforge.runtime.batch import Int64
from angelforge.runtime.constraint import Constraint as Constraint
from angelforge.runtime.detokenizer import TextStream
from angelforge.runtime.history import History
from angelforge.runtime.logprobs import TokenLogprob as TokenLogprob
from angelforge.runtime.pages import Lease
from angelforge.runtime.prefixes import PageKeys
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
    logprobs: tuple[TokenLogprob, ...] | None = None  # of `token_ids`, where asked for
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None  # of the prompt's, where asked for; the first: None
    cached_tokens: int = 0  # of the prompt, those taken from pages that were in the cache

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
    logprobs: tuple[TokenLogprob, ...] | None = None  # of `token_ids`, where asked for


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
        constraint: Constraint | None = None,
    ) -> None:
        """`max_length` is where the output ends; it is the prompt's where nothing but `prompt_logprobs` is asked for.

        Without `text` the output has token ids only.
        """
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
        self.keys = PageKeys(1, False)  # of its pages; the scheduler knows their size
        self.covered = 0  # positions that a draft's cache holds too
        self.proposed: tuple[int, ...] = ()  # tokens that a draft expects next; the next step checks them
        self.tally: Tally | None = None  # of speculation
        self.rng = np.random.default_rng(params.seed)
        # Only the repetition penalty looks at the prompt, which may be long.
        seen = prompt if params.repetition_penalty != 1.0 else prompt[:0]
        self.history = History(seen) if params.penalizes else None
        self.constraint = constraint
        self.cached_tokens: int | None = None  # of the prompt, those that were in the cache when it started
        # Positions of the prompt of which no logprob is asked for any more; the last tells of the first output token.
        self.scored = 0 if params.prompt_logprobs is not None else self.prompt_length - 1
        self.outbox = outbox
        self.finished = False
        self._text = text
        self._pieces: list[str] = []
        self._logprobs: list[TokenLogprob] | None = None if params.logprobs is None else []
        self._prompt_logprobs: list[TokenLogprob | None] = [None]
        self._begin = time.perf_counter()
        self._first_token: float | None = None

    @property
    def known(self) -> Int64:
        """Prompt and output so far, int64 [length]."""
        return self.tokens[: self.length]

    @property
    def cache_length(self) -> int:
        """Positions that are in the KV cache when the output is as long as it can be: its last token is not."""
        return max(self.prompt_length, self.max_length - 1)

    def score(self, found: Sequence[TokenLogprob]) -> None:
        """Notes the logprobs of the prompt's next tokens."""
        self._prompt_logprobs.extend(found)
        self.scored += len(found)

    def accept(self, token: int, logprob: TokenLogprob | None = None) -> None:
        """Appends a generated token and ends the request if it is the last.

        `logprob` is needed where logprobs are asked for. Raises AngelForgeError where a constraint does.
        """
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
        if self.history is not None:
            self.history.add(token)
        if self._logprobs is not None:
            assert logprob is not None
            self._logprobs.append(logprob)
        self._emit(text, (token,), reason)
        if reason is None and self.constraint is not None:
            self.constraint.accept(token)

    def end(self, reason: FinishReason, error: str | None = None) -> None:
        """Ends the request before its time; one that has ended stays as it is."""
        if not self.finished:
            self._emit("", (), reason, error)

    def _emit(self, text: str, ids: tuple[int, ...], reason: FinishReason | None, error: str | None = None) -> None:
        logprobs = None if self._logprobs is None else tuple(self._logprobs[-1:] if ids else ())
        if reason is None:
            self._pieces.append(text)
            self.outbox.append(Delta(self.index, text, ids, None, logprobs))
            return
        self.finished = True
        self.history = None  # with what a device keeps of it
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
            logprobs=None if self._logprobs is None else tuple(self._logprobs),
            prompt_logprobs=None if self.params.prompt_logprobs is None else tuple(self._prompt_logprobs),
            cached_tokens=self.cached_tokens or 0,
        )
        self.outbox.append(Delta(self.index, text, ids, result, logprobs))
