"""A second interrupt ends a server at once, whatever its clients do, on every Python."""

import asyncio
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support.http_server import served, wait_until

from angelforge.runtime.llm import LLM


async def wait_closed(self: Any) -> None:
    """That of Python 3.12 and later: until all connections have gone."""
    while self._active_count:
        await asyncio.sleep(0.01)


def test_interrupted_twice_while_a_client_holds_its_connection(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that never sends all of its request is not waited for; the connection is cut, the port free."""
    if sys.version_info < (3, 12):
        monkeypatch.setattr(asyncio.base_events.Server, "wait_closed", wait_closed)
    with (
        LLM(toy, threads=1) as llm,
        served(llm, drain_seconds=300) as running,
        socket.create_connection(running.bound.getsockname(), timeout=60) as kept,
    ):
        kept.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 50\r\n\r\n{")
        wait_until(lambda: bool(running.server.server_state.tasks))
        running.server.handle_exit(signal.SIGINT, None)
        wait_until(lambda: running.bound.fileno() < 0)  # the door is closed, the connection waited for
        assert running.thread.is_alive()
        running.server.handle_exit(signal.SIGINT, None)
        running.thread.join(60)
        assert not running.thread.is_alive()
        with suppress(ConnectionError):
            while kept.recv(100):
                pass
