"""Requests that belong together, seen from asyncio: the choices of one answer, or the prompts of one list."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

from angelforge.runtime.constraint import Constraint
from angelforge.runtime.llm import LLM
from angelforge.runtime.observer import Observer
from angelforge.runtime.prompts import Prompt
from angelforge.runtime.request import Delta
from angelforge.runtime.sampling import SamplingParams


@dataclass(frozen=True, eq=False)
class Work:
    """One request to come; a constraint has a state, so that each needs its own."""

    prompt: Prompt
    params: SamplingParams
    constraint: Constraint | None = None


class Call:
    """Requests in flight; a delta's `index` is the place of its request in `work`. Made by `Service.submit`."""

    def __init__(self, llm: LLM, work: Sequence[Work], cancel: Callable[[Call], None]) -> None:
        """Raises UsageError for a request that can never run."""
        self.outbox: deque[Delta] = deque()  # filled by the engine's thread
        self.requests = tuple(
            llm.make_request(one.prompt, one.params, self.outbox, index=index, constraint=one.constraint)
            for index, one in enumerate(work)
        )
        self.left = len(self.requests)  # requests whose output has not been delivered
        #: Why requests failed: the caller's error, or a shutdown; None: the engine's.
        self.fault: Literal["refused", "stopped"] | None = None
        self._cancel = cancel
        self._new: list[Delta] = []
        self._arrived = asyncio.Event()
        begin = perf_counter()
        self._last = [begin] * len(self.requests)  # when a request's latest tokens came
        self._begun = [False] * len(self.requests)

    async def next(self) -> list[Delta]:
        """What is new, as soon as something is, one delta a request; empty once all have ended and all was given.

        A reader that is slow gets more at a time; what waits for it is at most the whole output.
        """
        while self.left and not self._new:
            self._arrived.clear()
            await self._arrived.wait()
        new, self._new = self._new, []
        return merged(new)

    def cancel(self) -> None:
        """Ends what has not ended and frees its pages; may be called at any time and more than once."""
        if self.left:
            self._cancel(self)

    def collect(self) -> list[Delta]:
        """In the engine's thread: what is in the outbox, which is empty then."""
        new = list(self.outbox)
        self.outbox.clear()
        return new

    def deliver(self, deltas: list[Delta]) -> None:
        """In the event loop: what the engine's thread has collected."""
        self._new += deltas
        self.left -= sum(delta.output is not None for delta in deltas)
        self._arrived.set()

    def observe(self, deltas: Sequence[Delta], time: float, observer: Observer) -> None:
        """Tells the observer of tokens that came at `time`, and of the end."""
        for delta in merged(deltas):
            count, place = len(delta.token_ids), delta.index
            if count:
                if self._begun[place]:
                    observer.tokens(count, time - self._last[place])
                else:
                    observer.first_token(time - self._last[place])
                    self._begun[place] = True
                self._last[place] = time
            if delta.output is not None:
                observer.ended(delta.output)


def merged(deltas: Sequence[Delta]) -> list[Delta]:
    """The same with one delta for each request, in the order of their first: a draft gives several at once."""
    if len(deltas) < 2:
        return list(deltas)
    by_index: dict[int, list[Delta]] = {}
    for delta in deltas:
        by_index.setdefault(delta.index, []).append(delta)
    return [parts[0] if len(parts) == 1 else _joined(parts) for parts in by_index.values()]


def _joined(parts: list[Delta]) -> Delta:
    logprobs = None
    if any(part.logprobs is not None for part in parts):
        logprobs = tuple(found for part in parts for found in part.logprobs or ())
    return Delta(
        index=parts[0].index,
        text="".join(part.text for part in parts),
        token_ids=tuple(token for part in parts for token in part.token_ids),
        output=parts[-1].output,
        logprobs=logprobs,
    )
