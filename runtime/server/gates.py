"""What a request passes before an endpoint sees it: counting, the API key, the size of the body. Plain ASGI."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from angelforge.runtime.server.errors import error_response
from angelforge.runtime.server.metrics import Metrics


class CountGate:
    """Counts answers by endpoint and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics, endpoints: Iterable[str]) -> None:
        self._app, self._metrics, self._endpoints = app, metrics, frozenset(endpoints)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # Any other path could be a new time series for each request.
        endpoint = scope["path"] if scope["path"] in self._endpoints else "other"

        started = False

        async def counted(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self._metrics.requests.labels(endpoint, str(message["status"])).inc()
            await send(message)

        try:
            await self._app(scope, receive, counted)
        finally:
            if not started:  # it failed: what is around answers 500
                self._metrics.requests.labels(endpoint, "500").inc()


class KeyGate:
    """Lets requests below /v1 pass only with `Authorization: Bearer KEY`; without a key all pass."""

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self._app = app
        self._expected = None if key is None else f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "http" and self._expected is not None and scope["path"].startswith("/v1"):
            shown = Headers(scope=scope).get("authorization", "").encode("latin-1")
            if shown[:7].lower() == b"bearer ":  # the scheme's case does not matter (RFC 9110, 11.1)
                shown = b"Bearer " + shown[7:]
            if not hmac.compare_digest(shown, self._expected):
                missing = "no API key was given" if not shown else "the API key is wrong"
                answer = error_response(401, f"This server needs an API key, but {missing}.", code="invalid_api_key")
                await answer(scope, receive, send)
                return
        await self._app(scope, receive, send)


class SizeGate:
    """Refuses bodies of more than `limit` bytes, announced or not, without reading on, and those that do not come.

    A body of which nothing arrives for `stall_seconds` gets 408.
    """

    def __init__(self, app: ASGIApp, limit: int, stall_seconds: float) -> None:
        self._app, self._limit, self._stall_seconds = app, limit, stall_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        told = f"The body has more than {self._limit} bytes"
        announced = Headers(scope=scope).get("content-length", "0")
        if announced.isascii() and announced.isdigit() and int(announced) > self._limit:
            await error_response(413, f"{told}.")(scope, receive, send)
            return
        count, more = 0, True

        async def counted() -> Message:
            nonlocal count, more
            try:  # after the body only the end of the connection comes, however late
                message = await asyncio.wait_for(receive(), self._stall_seconds if more else None)
            except asyncio.TimeoutError:
                raise HTTPException(408, f"Nothing of the body has come for {self._stall_seconds:g} s") from None
            more = message.get("more_body", False)
            count += len(message.get("body", b""))
            if count > self._limit:
                raise HTTPException(413, told)
            return message

        await self._app(scope, counted, send)
