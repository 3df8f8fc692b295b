"""A server in a thread of the test's process, on a port of its own, and what tests ask it."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx2
import openai

from angelforge.runtime.llm import LLM
from angelforge.runtime.server.options import ServerOptions
from angelforge.runtime.server.run import Server, bind

CALL = "Hello, I have a cough."


class Running:
    """A server that answers; leave the `with` to end it."""

    def __init__(self, llm: LLM, options: ServerOptions) -> None:
        self.llm, self.options = llm, options
        self.bound = bind("127.0.0.1", 0)
        self.server = Server(llm, options, self.bound)
        self.url = self.server.url
        self.thread = threading.Thread(target=lambda: asyncio.run(self.server.run_until_told()))
        self.http = httpx2.Client(base_url=self.url, timeout=60)

    def __enter__(self) -> Running:
        self.thread.start()
        wait_until(lambda: self.server.started)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.http.close()
        self.server.tell_to_end()
        self.thread.join()
        self.bound.close()

    def client(self, key: str = "none") -> openai.OpenAI:
        """OpenAI's own client, which retries nothing so that tests see every answer."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def post(self, path: str, body: dict[str, Any]) -> httpx2.Response:
        """An answer of whatever status."""
        return self.http.post(path, json={"model": self.options.model, **body})

    def metric(self, name: str) -> float:
        """A value of /metrics; a name with labels is written as it stands there."""
        for line in self.http.get("/metrics").text.splitlines():
            if line.startswith(f"angelforge_{name} "):
                return float(line.split()[-1])
        raise KeyError(name)

    def is_idle(self) -> bool:
        """Whether no request holds or wants anything."""
        return not any(self.metric(name) for name in ("requests_running", "requests_waiting", "kv_pages_used"))

    def held_pages(self) -> set[int]:
        """Pages that are neither free nor spare; only while nothing runs."""
        pool = self.llm.stepper.scheduler.pool
        return set(range(pool.capacity - pool.free))


def wait_until(holds: Callable[[], bool], seconds: float = 30.0) -> None:
    """Returns when something holds; fails after so many seconds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it does not come to hold"
        time.sleep(0.01)


@contextmanager
def served(llm: LLM, **options: Any) -> Iterator[Running]:
    """A server around an LLM, with these options."""
    with Running(llm, ServerOptions(model="toy", port=0, **{"drain_seconds": 5.0, **options})) as running:
        yield running


def build_toy(folder: Path, template: str | None = None) -> Path:
    """The bundle of the toy with its draft in `folder`, built for the CPU; with another chat template if given."""
    from angelforge.engines.cpu import build_cpu
    from angelforge.exporter.export import ExportOptions, export
    from angelforge.tools.toy import DRAFT, MODEL

    source = MODEL
    if template is not None:
        source = folder / "model"
        shutil.copytree(MODEL, source)
        (source / "chat_template.jinja").write_text(template)
    build_cpu(export(str(source), folder / "bundle", ExportOptions(draft=str(DRAFT))))
    return folder / "bundle"
