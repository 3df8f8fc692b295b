"""Clients that hold connections open and send nothing, or half of something: they are let go, others are not."""

import json
import socket
from pathlib import Path

import pytest
from support.http_server import CALL, Running, served

from angelforge.runtime.llm import LLM
from angelforge.runtime.server import run

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


def connect(running: Running) -> socket.socket:
    return socket.create_connection(running.bound.getsockname(), timeout=60)


def answer(client: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    found = b""
    while piece := client.recv(4096):
        found += piece
    return found


@pytest.mark.parametrize("sent", [b"", b"POST /v1/completions HTT", b"GET /health HTTP/1.1\r\nHost: a\r\n\r\nGET "])
def test_connections_without_a_request_are_closed(toy: Path, monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    """Whether nothing has come, or the begin of a first request, or that of a second one."""
    monkeypatch.setattr(run, "_KEEP_ALIVE", 1)
    with LLM(toy, threads=1) as llm, served(llm) as running, connect(running) as client:
        client.sendall(sent)
        assert answer(client).count(b"200 OK") == sent.count(b"/health")
        assert running.http.get("/health").status_code == 200


def test_a_body_that_does_not_come_is_refused(toy: Path) -> None:
    with LLM(toy, threads=1) as llm, served(llm, stall_seconds=0.5) as running, connect(running) as client:
        client.sendall(HEAD % 100 + b'{"model":')
        found = answer(client)
        assert found.startswith(b"HTTP/1.1 408 ")
        error = json.loads(found.split(b"\r\n\r\n")[1])["error"]
        assert error["message"].startswith("Nothing of the body has come for 0.5 s")
        assert running.http.get("/health").status_code == 200


def test_long_answers_are_not_cut(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request at work is no silence, however long it takes, and neither is waiting for its end."""
    monkeypatch.setattr(run, "_KEEP_ALIVE", 0.1)
    body = json.dumps({"model": "toy", "prompt": CALL, "max_tokens": 450, "n": 8, "ignore_eos": True}).encode()
    with LLM(toy, threads=1, speculate=0) as llm, served(llm, stall_seconds=0.1) as running:
        forward = llm.stepper.engine.forward
        steps: list[int] = []
        monkeypatch.setattr(llm.stepper.engine, "forward", lambda batch: steps.append(1) or forward(batch))
        with connect(running) as client:
            client.sendall(HEAD % len(body) + body)
            found = answer(client)
    assert found.startswith(b"HTTP/1.1 200 ")
    assert len(steps) > 400
