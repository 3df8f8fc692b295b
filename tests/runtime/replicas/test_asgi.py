"""One request through an application in the same process."""

import asyncio
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from angelforge.runtime.replicas.asgi import answer
from angelforge.runtime.replicas.envelope import Envelope, Head


def request(path: str, body: bytes = b"") -> Envelope:
    """A POST with a body."""
    return Envelope("POST", path, b"a=1", ((b"content-type", b"text/plain"),), body, "")


def make_app(log: list[str]) -> FastAPI:
    """An application that echoes, streams without end, and fails."""
    app = FastAPI()

    @app.post("/echo")
    async def echo(request: Request) -> dict[str, Any]:
        return {"body": (await request.body()).decode(), "query": str(request.query_params)}

    @app.post("/endless")
    async def endless() -> StreamingResponse:
        async def pieces() -> Any:
            try:
                while True:
                    yield b"piece"
            finally:
                log.append("left")

        return StreamingResponse(pieces())

    @app.post("/fails")
    async def fails() -> None:
        raise ZeroDivisionError

    return app


def test_the_answer_is_the_applications() -> None:
    """Body and query arrive; head and body come back."""

    async def ask() -> list[Head | bytes]:
        return [piece async for piece in answer(make_app([]), request("/echo", b"hello"))]

    head, *body = asyncio.run(ask())
    assert isinstance(head, Head)
    assert head.status == 200
    assert (b"content-type", b"application/json") in head.headers
    assert b"".join(piece for piece in body if isinstance(piece, bytes)) == b'{"body":"hello","query":"a=1"}'


def test_a_reader_that_leaves_ends_the_application() -> None:
    """An endless answer waits for its reader, and ends when that is gone."""
    log: list[str] = []

    async def ask() -> None:
        stream = answer(make_app(log), request("/endless"))
        pieces = [await anext(stream) for _ in range(3)]
        assert pieces[1:] == [b"piece"] * 2
        await asyncio.sleep(0.05)
        assert log == []
        await stream.aclose()  # type: ignore[attr-defined]

    asyncio.run(asyncio.wait_for(ask(), 20))
    assert log == ["left"]


def test_a_failing_application_is_an_error() -> None:
    """After the answer that it may have given."""

    async def ask() -> list[Head | bytes]:
        found = []
        with pytest.raises(ZeroDivisionError):
            async for piece in answer(make_app([]), request("/fails")):
                found.append(piece)
        return found

    head = asyncio.run(ask())[0]
    assert isinstance(head, Head)
    assert head.status == 500
