"""Runs one request through an ASGI application in this process, and gives its answer piece by piece."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, MutableMapping
from typing import Any

from angelforge.runtime.replicas.envelope import Envelope, Head

_WAITING = 64  # pieces that wait for a slow reader until the application waits, too


async def answer(app: Any, request: Envelope) -> AsyncIterator[Head | bytes]:
    """The `Head` of the application's answer and then the pieces of its body, as the application sends them.

    Closing the iterator tells the application that its client is gone. https://asgi.readthedocs.io, HTTP, version 2.
    """
    pieces: asyncio.Queue[Head | bytes | None] = asyncio.Queue(_WAITING)
    gone = asyncio.Event()
    unread = [request.body]

    async def receive() -> MutableMapping[str, Any]:
        if unread:
            return {"type": "http.request", "body": unread.pop(), "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: MutableMapping[str, Any]) -> None:
        if gone.is_set():
            raise OSError("the client is gone")
        if message["type"] == "http.response.start":
            await pieces.put(Head(message["status"], tuple(message.get("headers", ()))))
            return
        if message.get("body"):
            await pieces.put(message["body"])
        if not message.get("more_body"):
            await pieces.put(None)

    running = asyncio.ensure_future(_run(app, _scope(request), receive, send, pieces))
    try:
        while (piece := await pieces.get()) is not None:
            yield piece
        await running
    finally:
        gone.set()
        while not pieces.empty():  # it may wait for room
            pieces.get_nowait()
        await asyncio.wait([running])
        if not running.cancelled():
            running.exception()  # what it says of a client that left is no news


async def _run(app: Any, scope: dict[str, Any], receive: Any, send: Any, pieces: asyncio.Queue[Any]) -> None:
    try:
        await app(scope, receive, send)
    finally:
        await pieces.put(None)  # also where it failed without an answer; the reader has made room if it is gone


def _scope(request: Envelope) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": request.method,
        "scheme": "http",
        "path": request.path,
        "raw_path": request.path.encode(),
        "query_string": request.query,
        "root_path": "",
        "headers": list(request.headers),
        "client": None,
        "server": None,
    }
