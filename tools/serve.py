"""`angelforge serve`: an OpenAI-compatible server around a built bundle."""

from __future__ import annotations

import asyncio
import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from angelforge.errors import UsageError
from angelforge.runtime.depth import Depth
from angelforge.tools.engine_options import kv_memory_option, target_option, tensor_parallel_option, threads_option
from angelforge.tools.options import NUMBER, bundle_argument, json_option
from angelforge.tools.output import print_json, total_progress
from angelforge.tools.speculation_text import speculate_option

if TYPE_CHECKING:
    from angelforge.runtime.server.options import ServerOptions

_KEY = "ANGELFORGE_API_KEY"


@click.command()
@bundle_argument
@target_option
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen; 0.0.0.0 for all networks.")
@click.option("--port", default=8000, show_default=True, help="0: any that is free.")
@click.option("--model-name", help="What requests call the model. Default: the bundle's folder.")
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path),
    help=f"A file with the key that requests must show. Default: the variable {_KEY}; without both none is asked for.",
)
@click.option("--max-requests", default=256, show_default=True, help="Open at once; more are answered with 429.")
@click.option("--max-batch", default=32, show_default=True, help="Requests computed at once; the others wait.")
@click.option(
    "--max-body-mb", type=NUMBER, default=16.0, show_default=True, help="MB (10⁶ bytes) that a request may have."
)
@click.option("--default-max-tokens", default=256, show_default=True, help="Of a completion that names no max_tokens.")
@click.option(
    "--drain-seconds", type=NUMBER, default=30.0, show_default=True, help="What open requests get when it is to end."
)
@click.option("--replicas", default=1, show_default=True, help="Copies of the engine behind one address, on Ray Serve.")
@click.option("--ray", help="Address of a running Ray, whose machines the replicas use. Default: one on this machine.")
@speculate_option
@kv_memory_option
@threads_option
@tensor_parallel_option
@json_option
def serve(
    bundle: Path,
    target: str,
    host: str,
    port: int,
    model_name: str | None,
    api_key_file: Path | None,
    max_requests: int,
    max_batch: int,
    max_body_mb: float,
    default_max_tokens: int,
    drain_seconds: float,
    replicas: int,
    ray: str | None,
    speculate: Depth,
    kv_memory: int | None,
    threads: int | None,
    tensor_parallel: int,
    as_json: bool,
) -> None:
    """Serve a built bundle over HTTP, as OpenAI's API: /v1/completions, /v1/chat/completions, /v1/models.

    Runs until Ctrl-C or SIGTERM; open requests may then end. /health and /metrics tell how it is. Prompts and outputs
    are not logged. With --json one object is printed once requests are answered: url, model.

    \b
    Example:
      angelforge serve bundle --port 8000
    """
    from angelforge.runtime.server.options import ServerOptions

    options = ServerOptions(
        model=model_name or bundle.resolve().name,
        host=host,
        port=port,
        api_key=_api_key(api_key_file),
        max_body=int(max_body_mb * 1e6),
        max_requests=max_requests,
        max_tokens=default_max_tokens,
        drain_seconds=drain_seconds,
    )
    if replicas != 1 or ray is not None:
        if tensor_parallel != 1:
            raise UsageError(
                "--replicas gives every replica one device, so --tensor-parallel does not go with it. Start a server "
                "for each group of ranks instead, behind a proxy."
            )
        from angelforge.runtime.replicas.options import ReplicaOptions
        from angelforge.runtime.replicas.run import serve_replicas

        many = ReplicaOptions(
            bundle.resolve(), target, replicas, options, kv_memory, max_batch, threads, speculate, cluster=ray
        )
        serve_replicas(many, lambda url: _tell(url, options, as_json))
        return
    loading = {"kv_memory": kv_memory, "max_batch": max_batch, "threads": threads, "speculate": speculate}
    _serve_one(bundle, target, tensor_parallel, loading, options, as_json)


def _serve_one(
    bundle: Path, target: str, tensor_parallel: int, loading: dict[str, Any], options: ServerOptions, as_json: bool
) -> None:
    """Serves one engine in this process; of several ranks the first does, the others work for it."""
    from angelforge.runtime.llm import LLM
    from angelforge.runtime.server.run import Server, bind

    with ExitStack() as stack:
        # An address that is taken is told before minutes of loading; only one of several ranks may have it, which is
        # known when they have met.
        bound = stack.enter_context(bind(options.host, options.port)) if tensor_parallel == 1 else None
        with total_progress("load weights") as progress:
            llm = LLM(bundle, target, tensor_parallel=tensor_parallel, progress=progress, **loading)
        stack.enter_context(llm)
        server = Server(llm, options, bound or stack.enter_context(bind(options.host, options.port)))
        asyncio.run(server.run_until_told(lambda: _tell(server.url, options, as_json)))


def _tell(url: str, options: ServerOptions, as_json: bool) -> None:
    if as_json:
        print_json({"url": url, "model": options.model})
        return
    key = "an API key is needed" if options.api_key else "no API key is needed"
    click.echo(f"{options.model} is served at {url}/v1 ({key}). Ctrl-C ends it.")
    if options.api_key is None and options.host not in ("127.0.0.1", "localhost", "::1"):
        click.echo("warning: everyone who reaches this address can use the model. See --api-key-file.", err=True)


def _api_key(file: Path | None) -> str | None:
    """The key: the file's first line, or the environment's; None without both."""
    if file is None:
        return os.environ.get(_KEY) or None
    try:
        lines = file.read_text(encoding="ascii").splitlines()
    except UnicodeDecodeError:
        raise UsageError(f"{file} is not ASCII text. One line with the key is expected.") from None
    if not lines or not lines[0].strip():
        raise UsageError(f"{file} has no key in its first line.")
    return lines[0].strip()
