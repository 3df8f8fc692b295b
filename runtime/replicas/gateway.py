"""The one address: hands every request to a replica, and to another one if that dies before it has begun to answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from angelforge.runtime.replicas.envelope import Envelope, Head, prefix_of
from angelforge.runtime.server.errors import error_response

_TRIES = 5  # replicas that may die under one request
_PAUSE = 0.2  # seconds before the next try: the router has to hear of the death
_NO_METRICS = "Behind this address are several replicas: Ray exports their metrics (ray_serve_…), see docs/serving.md."
_FULL = "All replicas have as many requests as they take. Try again later."
_DEAD = "The replicas that were to answer have died. Try again later."


class Gateway:
    """Stateless: a request is read whole, an answer is passed on as it comes."""

    def __init__(self, replica: Any, max_body: int) -> None:
        """`replica` is Ray Serve's handle; requests above `max_body` bytes are refused."""
        self._replica = replica.options(method_name="answer", stream=True)
        self._max_body = max_body

    async def __call__(self, request: Request) -> Response:
        """Answers one HTTP request."""
        if request.url.path == "/metrics":
            return error_response(404, _NO_METRICS)
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self._max_body:
                return error_response(413, f"The body has more than {self._max_body} bytes.")
        scope = request.scope
        headers = tuple((name.lower(), value) for name, value in scope["headers"])
        envelope = Envelope(
            request.method, request.url.path, scope["query_string"], headers, bytes(body), prefix_of(bytes(body))
        )
        for _ in range(_TRIES):
            stream = self._replica.remote(envelope)
            try:
                head = await _first(stream)
            except BackPressureError:
                return error_response(429, _FULL)
            except RayActorError:  # it died, or cannot be reached: nothing was sent to the client yet
                await asyncio.sleep(_PAUSE)
                continue
            response = StreamingResponse(_rest(stream), head.status)
            response.raw_headers = list(head.headers)
            return response
        return error_response(503, _DEAD)


async def _first(stream: Any) -> Head:
    try:
        head = await stream.__anext__()
    except asyncio.CancelledError:
        stream.cancel()
        raise
    assert isinstance(head, Head)
    return head


async def _rest(stream: Any) -> AsyncIterator[bytes]:
    """The body. It breaks off where the replica dies: the client sees an answer that does not end."""
    ended = False
    try:
        async for piece in stream:
            yield piece
        ended = True
    except (RayActorError, RayTaskError) as error:
        ended = True
        raise ConnectionError("the replica that was answering has died") from error
    finally:
        if not ended:  # the client is gone
            stream.cancel()
