"""How an endpoint answers: whole, or as a stream of events; what differs between endpoints is an `Answer`."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import ExitStack
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from angelforge.runtime.call import Call
from angelforge.runtime.request import Delta, RequestOutput
from angelforge.runtime.server.errors import ApiError, error_body
from angelforge.runtime.server.host import all_outputs, first_deltas, raise_failure, usage
from angelforge.runtime.server.streaming import Event, EventStream, Gone, unless_gone


class Answer(ABC):
    """The form of one answer; it keeps what one part of a stream must know of those before it."""

    #: `object` of a whole answer and of an event of a stream.
    whole: str
    event: str

    def __init__(self, head: dict[str, Any], choices: int, include_usage: bool) -> None:
        """`head` is in every object of the answer; `choices` are those of each prompt."""
        self._head, self._choices, self._include_usage = head, choices, include_usage

    @abstractmethod
    def choice(self, index: int, output: RequestOutput) -> dict[str, Any]:
        """A whole choice."""

    @abstractmethod
    def opening(self, index: int) -> list[dict[str, Any]]:
        """What a stream says of a choice before anything has been generated."""

    @abstractmethod
    def pieces(self, delta: Delta) -> list[dict[str, Any]]:
        """What a stream says of a delta, the last of a choice with its finish reason."""

    def body(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        """The whole answer."""
        choices = [self.choice(index, output) for index, output in enumerate(outputs)]
        return {**self._head, "object": self.whole, "choices": choices, "usage": usage(outputs, self._choices)}

    async def events(self, call: Call, deltas: list[Delta]) -> AsyncIterator[list[Event]]:
        """The answer as a stream; `deltas` are those that were taken from `call` already."""
        outputs: dict[int, RequestOutput] = {}
        yield [self._event([piece]) for index in range(len(call.requests)) for piece in self.opening(index)]
        while deltas:
            events: list[Event] = []
            for delta in deltas:
                try:
                    raise_failure(call, delta.output)
                except ApiError as error:
                    yield [*events, error_body(error.status, str(error))]
                    return
                events += [self._event([piece]) for piece in self.pieces(delta)]
                if delta.output is not None:
                    outputs[delta.index] = delta.output
            yield events
            deltas = await call.next()
        if self._include_usage:
            counted = usage([outputs[index] for index in range(len(outputs))], self._choices)
            yield [self._event([]) | {"usage": counted}]

    def _event(self, choices: list[dict[str, Any]]) -> Event:
        event = {**self._head, "object": self.event, "choices": choices}
        return event | {"usage": None} if self._include_usage else event


async def respond(request: Request, call: Call, answer: Answer, stream: bool, stall_seconds: float) -> Response:
    """Answers when there is something to say; a client that goes away ends its requests."""
    with ExitStack() as stack:
        stack.callback(call.cancel)
        if stream:
            first = await unless_gone(request, first_deltas(call))
            if first is None:
                return Gone()
            stack.pop_all()
            return EventStream(answer.events(call, first), call.cancel, stall_seconds)
        outputs = await unless_gone(request, all_outputs(call))
        if outputs is None:
            return Gone()
        # Log probabilities of long prompts take a second to write down; meanwhile others are served.
        return await asyncio.to_thread(lambda: JSONResponse(answer.body(outputs)))
