"""`angelforge bench serve`: how fast a server answers, by how many clients ask at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from angelforge.errors import AngelForgeError
from angelforge.runtime.depth import Depth
from angelforge.tools.bench_decode import depths, report
from angelforge.tools.engine_options import target_option, threads_option
from angelforge.tools.load.options import Asks, LoadOptions, load_options
from angelforge.tools.options import json_option
from angelforge.tools.output import total_progress
from angelforge.tools.speculation_text import speculate_option

if TYPE_CHECKING:
    from angelforge.manifest import Manifest
    from angelforge.targets import Target
    from angelforge.tools.load.figures import Figures
    from angelforge.tools.load.over_http import Address

_VOCABULARY = 1000  # ids that any model has, for random prompts to a server of which nothing else is known


@click.command()
@click.argument("server")
@target_option
@load_options
@speculate_option
@threads_option
@json_option
def serve(
    server: str,
    target: str,
    load: LoadOptions,
    speculate: Depth,
    threads: int | None,
    as_json: bool,
) -> None:
    """Ask a server under load: tokens/s, time to the first token, time between events of a stream.

    SERVER is an address (http://HOST:PORT, of whatever OpenAI-compatible server; ANGELFORGE_API_KEY holds its key), or
    a bundle: that is served here, once without its draft and once with it. Each client reads a stream and then asks
    the next.

    \b
    Example:
      angelforge bench serve demo/bundle --concurrency 1,8,64
    """
    from angelforge.bundle import Bundle
    from angelforge.targets import get_target
    from angelforge.tools.load.over_http import Address

    found: list[Figures] = []
    if "://" in server:
        address = Address(server, key=os.environ.get("ANGELFORGE_API_KEY"))
        address = Address(server, address.first_model(), address.key)
        found += _measure(address, load)
        report(found, {"server": server, "model": address.model}, load.plot, as_json)
        return
    manifest = Bundle.open(Path(server)).manifest
    for depth in depths(manifest, speculate):
        with _served(Path(server), target, depth, max(load.concurrencies), threads) as address:
            found += _measure(address, load, depth != 0, (manifest, get_target(target)))
    report(found, {"bundle": server, "target": target}, load.plot, as_json)


def _measure(
    address: Address,
    load: LoadOptions,
    drafted: bool = False,
    served: tuple[Manifest, Target] | None = None,
) -> list[Figures]:
    """A figure for each concurrency, beside the limit of what is `served` where that is known."""
    from angelforge.tools.load.figures import summarize
    from angelforge.tools.load.limit import limit_of
    from angelforge.tools.load.over_http import run_over_http

    found = []
    asks = Asks(load, _VOCABULARY)  # the same with the draft and without
    run_over_http(address, asks.take(1)[:1], 1, load.temperature, lambda ended, all_: None)  # first calls are slower
    for concurrency in load.concurrencies:
        these = asks.take(concurrency)
        name = f"{concurrency} clients{', with the draft' if drafted else ''}"
        with total_progress(name, "requests") as tell:
            samples, seconds = run_over_http(address, these, concurrency, load.temperature, tell)
        limit = None if served is None else limit_of(*served, concurrency, samples)
        found.append(summarize(samples, concurrency, drafted, seconds, limit=limit))
    return found


@contextmanager
def _served(bundle: Path, target: str, depth: Depth, clients: int, threads: int | None) -> Iterator[Address]:
    """A bundle in a server of its own process, so that clients and server do not share an interpreter."""
    from angelforge.tools.load.over_http import Address

    command = [sys.executable, "-m", "angelforge.tools", "serve", str(bundle), "--target", target, "--port", "0"]
    command += ["--json", "--speculate", str(depth), "--max-batch", str(clients)]
    command += ["--max-requests", str(max(256, clients))]
    command += [] if threads is None else ["--threads", str(threads)]
    environment = {name: value for name, value in os.environ.items() if name != "ANGELFORGE_API_KEY"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        try:
            told = ""
            for line in process.stdout:
                told += line
                if line == "}\n":
                    break
            answer = json.loads(told or "{}")
            if "url" not in answer:
                raise AngelForgeError("The bundle could not be served; what is wrong stands above.")
            yield Address(answer["url"], answer["model"])
            process.send_signal(signal.SIGTERM)
        finally:
            if process.poll() is None and sys.exc_info()[0] is not None:
                process.kill()
