"""Clients of every kind at once, on plain sockets: patient, streaming, slow, leaving early, and sending nonsense."""

from __future__ import annotations

import asyncio
import json
import random
import socket
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

KINDS = ("whole", "stream", "slow", "leaves stream", "leaves", "malformed", "too long", "unknown model")
EXPECTED = {"whole": 200, "stream": 200, "slow": 200, "malformed": 400, "too long": 400, "unknown model": 404}


@dataclass
class Round:
    """What came of a round: answers by kind and status, and what was wrong."""

    answers: Counter[tuple[str, int]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


async def load_round(port: int, clients: int, seed: int, max_tokens: int) -> Round:
    """So many clients at once, an eighth of them of each kind."""
    result = Round()
    await asyncio.gather(
        *(_client(port, KINDS[number % len(KINDS)], random.Random(seed * 1000 + number), max_tokens, result)
          for number in range(clients))
    )  # fmt: skip
    return result


async def _client(port: int, kind: str, rng: random.Random, max_tokens: int, result: Round) -> None:
    await asyncio.sleep(rng.random() * 0.5)
    raw = socket.socket()
    if kind == "slow":  # so that what is not read fills the server's buffer, not this one
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    raw.setblocking(False)
    await asyncio.get_running_loop().sock_connect(raw, ("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=raw, limit=2**12)
    try:
        path, body = _request(kind, rng, max_tokens)
        head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        writer.write(f"{head}\r\nConnection: close\r\n\r\n".encode() + body)
        await writer.drain()
        if kind == "leaves":
            await asyncio.sleep(rng.random() * 0.3)
            return
        status = int((await reader.readline()).split()[1])
        result.answers[kind, status] += 1
        if kind == "leaves stream":
            await reader.read(500)
            return
        _check(kind, status, await _rest(reader, rng, kind == "slow"), result)
    finally:
        writer.close()


async def _rest(reader: asyncio.StreamReader, rng: random.Random, slowly: bool) -> bytes:
    whole = b""
    while part := await reader.read(256 if slowly else 2**16):
        whole += part
        if slowly:
            await asyncio.sleep(rng.random() * 0.02)
    return whole


def _request(kind: str, rng: random.Random, max_tokens: int) -> tuple[str, bytes]:
    body: dict[str, Any] = {
        "model": "nobody" if kind == "unknown model" else "toy",
        "max_tokens": rng.randint(1, max_tokens),
        "ignore_eos": True,
        "seed": rng.randrange(10**6),
        "stream": kind in ("stream", "slow", "leaves stream"),
        "n": 1 + rng.randrange(2),
    }
    if kind == "slow":
        body["logprobs"] = 5 if rng.random() < 0.5 else None
    length = 600 if kind == "too long" else rng.randint(1, 100)
    if rng.random() < 0.5 and kind != "slow":
        path, body["messages"] = "/v1/chat/completions", [{"role": "user", "content": "a cough " * length}]
    else:
        path, body["prompt"] = "/v1/completions", [rng.randrange(6, 1000) for _ in range(length)]
    content = json.dumps(body).encode()
    return path, content[: rng.randrange(len(content))] if kind == "malformed" else content


def _check(kind: str, status: int, rest: bytes, result: Round) -> None:
    if status != EXPECTED[kind]:
        result.wrong.append(f"{kind}: {status} instead of {EXPECTED[kind]}: {rest[-300:]!r}")
    elif kind in ("stream", "slow") and b"data: [DONE]\n\n" not in rest:
        result.wrong.append(f"{kind}: a stream without its end: {rest[-300:]!r}")
    elif kind == "whole" and b'"finish_reason":"length"' not in rest.replace(b" ", b""):
        result.wrong.append(f"{kind}: not whole: {rest[-300:]!r}")
