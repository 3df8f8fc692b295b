"""A closed loop of clients over HTTP, a thread each; they read streams of an OpenAI-compatible server."""

from __future__ import annotations

import http.client
import json
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

from angelforge.errors import AngelForgeError, UsageError
from angelforge.tools.load.figures import Sample
from angelforge.tools.load.prompts import Ask

_SECONDS = 600.0  # without a byte from the server until a request counts as failed


@dataclass(frozen=True)
class Address:
    """Where a server is, and what it wants to see."""

    url: str  # without /v1
    model: str = ""
    key: str | None = None

    def connect(self) -> http.client.HTTPConnection:
        """A connection that is opened by the first request. Raises UsageError for what is no address."""
        parts = urlsplit(self.url)
        kind = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}.get(parts.scheme)
        if kind is None or parts.hostname is None:
            raise UsageError(f"{self.url} is no address of a server: http://HOST:PORT is expected.")
        return kind(parts.hostname, parts.port, timeout=_SECONDS)

    def open(self, method: str, path: str, body: dict[str, Any] | None = None) -> http.client.HTTPResponse:
        """The answer to a request, which is to be read. Raises AngelForgeError if it is none or an error."""
        connection = self.connect()
        headers = {"Content-Type": "application/json"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        path = urlsplit(self.url).path.rstrip("/").removesuffix("/v1") + path
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise AngelForgeError(f"{self.url} does not answer: {error}. Is the server running?") from None
        if answer.status != 200:
            raise AngelForgeError(f"{self.url}{path} answered {answer.status}: {_message(answer.read())}")
        return answer

    def first_model(self) -> str:
        """The name of the model that the server has."""
        try:
            return str(json.loads(self.open("GET", "/v1/models").read())["data"][0]["id"])
        except (ValueError, LookupError, TypeError):
            raise AngelForgeError(f"{self.url}/v1/models does not list a model as OpenAI's API does.") from None


def run_over_http(
    address: Address, asks: Sequence[Ask], concurrency: int, temperature: float, tell: Callable[[int, int], None]
) -> tuple[list[Sample], float]:
    """(a sample of each request, seconds in all) with `concurrency` clients; `tell` gets how many have ended, and all.

    Gaps are those between events with text: one event can hold several tokens of a draft. Raises AngelForgeError if a
    request fails.
    """
    waiting = deque(enumerate(asks))
    samples = [Sample() for _ in asks]
    failures: list[AngelForgeError] = []
    ended: list[int] = []

    def client() -> None:
        while not failures:
            try:
                index, ask = waiting.popleft()
            except IndexError:
                return
            try:
                samples[index] = _one(address, ask, index, temperature)
            except AngelForgeError as error:
                failures.append(error)
            ended.append(index)
            tell(len(ended), len(asks))

    threads = [threading.Thread(target=client, daemon=True) for _ in range(concurrency)]
    begin = perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return samples, perf_counter() - begin


def _one(address: Address, ask: Ask, seed: int, temperature: float) -> Sample:
    body: dict[str, Any] = {
        "model": address.model,
        "max_tokens": ask.max_tokens,
        "temperature": temperature,
        "seed": seed,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if ask.ignore_eos:
        body["ignore_eos"] = True
    path = "/v1/chat/completions" if ask.messages else "/v1/completions"
    body |= {"messages": ask.messages} if ask.messages else {"prompt": list(ask.ids) if ask.text is None else ask.text}
    sample, begun = Sample(), False
    last = perf_counter()
    for event in _events(address.open("POST", path, body)):
        now = perf_counter()
        if "error" in event:
            raise AngelForgeError(f"A stream broke off: {event['error'].get('message')}")
        if any(choice.get("text") or choice.get("delta", {}).get("content") for choice in event.get("choices", ())):
            if begun:
                sample.gaps.append(now - last)
            else:
                sample.first, begun = now - last, True
            last = now
        if usage := event.get("usage"):
            sample.tokens, sample.prompt_tokens = usage["completion_tokens"], usage["prompt_tokens"]
            sample.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return sample


def _events(answer: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    try:
        for line in answer:
            if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                yield json.loads(line[6:])
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise AngelForgeError(f"A stream broke off: {error}.") from None


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return body[:200].decode(errors="replace")
