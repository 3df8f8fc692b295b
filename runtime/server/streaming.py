"""Answers that notice when nobody reads them any more: whole ones, and server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from time import monotonic
from typing import Any, TypeVar

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")

Event = dict[str, Any]


class Gone(Response):
    """Nobody reads this: the client has closed the connection. The status is for the count of answers only."""

    def __init__(self) -> None:
        super().__init__(status_code=499)


async def unless_gone(request: Request, work: Awaitable[T]) -> T | None:
    """The result of `work`, None if the client closed the connection first; the body must have been read."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        return await working if working.done() else None
    finally:
        working.cancel()
        watching.cancel()


class EventStream(Response):
    """Sends lists of events as server-sent events, each list at once, and [DONE] after them.

    Calls `close` at the end, however it comes: when all is sent, when the client has closed the connection, or when it
    has read nothing for `stall_seconds` while something was to be sent.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[list[Event]], close: Callable[[], None], stall_seconds: float) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._close, self._stall_seconds = events, close, stall_seconds
        self._sending: float | None = None  # since when

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends it all."""
        pumping = asyncio.ensure_future(self._pump(send))
        watching = asyncio.ensure_future(_disconnected(receive))
        try:
            while not pumping.done() and not watching.done() and not self._stalled():
                await asyncio.wait(
                    {pumping, watching}, timeout=self._stall_seconds / 2, return_when=asyncio.FIRST_COMPLETED
                )
            if pumping.done():
                pumping.result()
        finally:
            pumping.cancel()
            watching.cancel()
            self._close()

    def _stalled(self) -> bool:
        return self._sending is not None and monotonic() - self._sending > self._stall_seconds

    async def _pump(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._events) as lists:  # type: ignore[type-var]
            async for events in lists:
                if events:
                    await self._send(send, "".join(map(_text, events)))
        await self._send(send, "data: [DONE]\n\n")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, text: str) -> None:
        self._sending = monotonic()
        await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
        self._sending = None


def _text(event: Event) -> str:
    return f"data: {json.dumps(event, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
