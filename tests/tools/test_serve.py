"""`angelforge serve` on the command line: what it prints, what it refuses, how it ends."""

import asyncio
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
from click.testing import CliRunner
from support.http_server import build_toy, served, wait_until

from angelforge.errors import UsageError
from angelforge.runtime.llm import LLM
from angelforge.runtime.sampling import SamplingParams
from angelforge.runtime.server.options import ServerOptions
from angelforge.runtime.server.run import Server, bind
from angelforge.tools.cli import main

COMMAND = [sys.executable, "-m", "angelforge.tools", "serve"]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_toy(tmp_path_factory.mktemp("toy"))


def test_it_serves_until_interrupted_and_says_nothing_of_prompts(toy: Path, tmp_path: Path) -> None:
    """A key from a file; a warning where the address is open; no output has a word of what was asked."""
    key = tmp_path / "key"
    key.write_text("a-key\n")
    options = ["--port", "0", "--json", "--api-key-file", str(key), "--threads", "1"]
    with subprocess.Popen(
        [*COMMAND, str(toy), *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        told = json.loads("".join(iter(server.stdout.readline, "}\n")) + "}")
        assert told["model"] == "bundle"
        body = {"model": "bundle", "prompt": "secret cough", "max_tokens": 3}
        assert httpx2.post(f"{told['url']}/v1/completions", json=body).status_code == 401
        headers = {"Authorization": "Bearer a-key"}
        assert httpx2.post(f"{told['url']}/v1/completions", json=body, headers=headers).status_code == 200
        wrong = {**body, "secret": 1}
        assert httpx2.post(f"{told['url']}/v1/completions?secret=1", json=wrong, headers=headers).status_code == 400
        server.send_signal(signal.SIGINT)
        output, errors = server.communicate(timeout=30)
    assert (server.returncode, output, errors) == (0, "", "")


def told_by(server: "subprocess.Popen[str]") -> str:
    """The address that a server with --json prints."""
    assert server.stdout is not None
    return str(json.loads("".join(iter(server.stdout.readline, "}\n")) + "}")["url"])


DYING = """
import sys
from angelforge.runtime.onnxruntime_engine import OnnxRuntimeEngine
from angelforge.tools.cli import main

def forward(self, batch):
    raise MemoryError

OnnxRuntimeEngine.forward = forward
main(["serve", *sys.argv[1:]])
"""


def test_it_ends_with_its_engine(toy: Path) -> None:
    """A lack of memory in the engine's thread: the open request is answered, and the process fails."""
    command = [sys.executable, "-c", DYING, str(toy), "--port", "0", "--json", "--threads", "1", "--speculate", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        body = {"model": "bundle", "prompt": "cough", "max_tokens": 3}
        answer = httpx2.post(f"{told_by(server)}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 500
        _, errors = server.communicate(timeout=30)
    assert server.returncode == 1
    assert errors.splitlines()[-1].startswith("error: The engine's thread has ended.")


@pytest.mark.full
@pytest.mark.parametrize("pause", [0.0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.8])
def test_interrupted_again_and_again(toy: Path, pause: float) -> None:
    """Whenever they come, the second interrupt and those after it do not turn the end into a failure."""
    command = [*COMMAND, str(toy), "--port", "0", "--json", "--threads", "1", "--drain-seconds", "1"]
    body = {"model": "bundle", "prompt": "a", "max_tokens": 400, "ignore_eos": True, "stream": True}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        with httpx2.stream("POST", f"{told_by(server)}/v1/completions", json=body, timeout=60) as stream:
            next(stream.iter_lines())
            for _ in range(3):
                server.send_signal(signal.SIGINT)
                time.sleep(pause)
        for _ in range(20):
            if server.poll() is None:
                server.send_signal(signal.SIGINT)
                time.sleep(0.05)
        output, errors = server.communicate(timeout=30)
    assert (server.returncode, output, errors) == (0, "", "")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--port", "99999"), "port"),
        (("--max-requests", "0"), "max_requests"),
        (("--host", "256.256.256.256"), "cannot be listened on"),
        (("--api-key-file", "/not/there"), "no such file"),
        (("--drain-seconds", "-1"), "0 to 86400 are possible"),
        (("--drain-seconds", "1e300"), "0 to 86400 are possible"),
        (("--drain-seconds", "nan"), "not a finite number"),
        (("--max-body-mb", "inf"), "not a finite number"),
    ],
)
def test_what_makes_no_sense_is_refused(toy: Path, options: tuple[str, ...], told: str) -> None:
    result = CliRunner().invoke(main, ["serve", str(toy), *options])
    assert result.exit_code in (1, 2)
    assert told in result.stderr


def test_a_port_that_is_taken(toy: Path) -> None:
    """It is told before the model is loaded."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = CliRunner().invoke(main, ["serve", "/not/a/bundle", "--port", str(taken.getsockname()[1])])
    assert result.exit_code == 2
    assert "in use" in result.stderr


def test_a_port_that_a_server_still_loads_for() -> None:
    """Another one is refused at once; when the first has ended, a next can bind beside its last connections."""
    bound = bind("127.0.0.1", 0)
    port = bound.getsockname()[1]
    with bound, pytest.raises(UsageError, match="in use"):
        bind("127.0.0.1", port)
    with bind("127.0.0.1", port):
        pass


def test_a_restart_while_the_last_connections_fade_away(toy: Path) -> None:
    """They do when the server was the one that closed them."""
    with LLM(toy, threads=1) as llm:
        with served(llm) as running, socket.create_connection(running.bound.getsockname()) as kept:
            port = running.bound.getsockname()[1]
            kept.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
            assert kept.recv(100).startswith(b"HTTP/1.1 200")
            running.server.tell_to_end()
            while kept.recv(100):
                pass
            running.thread.join()
        with pytest.raises(OSError, match="in use"), socket.socket() as strict:
            strict.bind(("127.0.0.1", port))
        bind("127.0.0.1", port).close()


def test_another_process_that_is_faster(toy: Path) -> None:
    """It listens there when the model is loaded; the service ends in order."""
    with LLM(toy, threads=1) as llm, socket.socket() as faster:
        bound = bind("127.0.0.1", 0)
        server = Server(llm, ServerOptions("toy"), bound)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        faster.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        faster.bind(bound.getsockname())
        faster.listen()
        with bound, pytest.raises(UsageError, match="in use"):
            asyncio.run(server.run_until_told())
        assert not server.service._thread.is_alive()


@pytest.mark.parametrize(("redirect", "told"), [("| true", ""), ("> /dev/full", "error: no space left on device.")])
def test_where_its_address_cannot_be_written(toy: Path, redirect: str, told: str) -> None:
    """It ends with a sentence at most."""
    command = f"{shlex.join(COMMAND)} {shlex.quote(str(toy))} --port 0 --threads 1 {redirect}"
    result = subprocess.run(command, shell=True, stderr=subprocess.PIPE, text=True, check=False, timeout=60)
    assert result.stderr.startswith(told)
    assert (result.stderr == "") == (told == "")
    assert "Traceback" not in result.stderr


def test_nobody_reads_its_last_words(toy: Path) -> None:
    """A stream that is not read when the server is told to end is cut, which is nothing to complain of."""
    body = {"model": "bundle", "prompt": "a", "n": 16, "max_tokens": 490, "ignore_eos": True, "logprobs": 5}
    content = json.dumps(body | {"stream": True}).encode()
    command = [*COMMAND, str(toy), "--port", "0", "--json", "--threads", "1", "--drain-seconds", "0.5"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        url = told_by(server)
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            connection.connect(("127.0.0.1", int(url.rpartition(":")[2])))
            head = "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
            connection.recv(100)
            server.send_signal(signal.SIGTERM)
            output, errors = server.communicate(timeout=60)
    assert (server.returncode, output, errors) == (0, "", "")


@pytest.mark.parametrize(("content", "told"), [("", "no key"), (" \n", "no key"), ("ключ\n", "not ASCII")])
def test_keys_that_are_none(tmp_path: Path, content: str, told: str) -> None:
    (tmp_path / "key").write_text(content)
    result = CliRunner().invoke(main, ["serve", "bundle", "--api-key-file", str(tmp_path / "key")])
    assert result.exit_code == 2
    assert told in result.stderr


@contextmanager
def ranks(bundle: Path) -> Iterator[tuple[list[subprocess.Popen[str]], str]]:
    """A server over two ranks, as torchrun starts them, and its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    command = [*COMMAND, str(bundle), "--tensor-parallel", "2", "--port", "0", "--json", "--threads", "1"]
    processes = [
        subprocess.Popen(command, env={**os.environ, **shared, "RANK": rank}, stdout=subprocess.PIPE, text=True)
        for rank in "01"
    ]
    try:
        first = processes[0].stdout
        assert first is not None
        yield processes, json.loads("".join(iter(first.readline, "}\n")) + "}")["url"]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.full
def test_over_two_ranks(small_checkpoint: Path, tmp_path: Path) -> None:
    """The first answers as one rank alone; told to end, it lets requests finish and both end. A dead rank is told."""
    bundle = tmp_path / "bundle"
    for command in (["export", small_checkpoint, bundle], ["build", bundle], ["build", bundle, "--tensor-parallel", 2]):
        assert CliRunner().invoke(main, list(map(str, command))).exit_code == 0
    with LLM(bundle, threads=1) as llm:
        (alone,) = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=40, ignore_eos=True))
    body = {"model": "bundle", "prompt": [5, 6, 7], "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    with ranks(bundle) as (processes, url):
        answer = httpx2.post(f"{url}/v1/completions", json=body | {"return_token_ids": True}, timeout=60)
        assert tuple(answer.json()["choices"][0]["token_ids"]) == alone.token_ids
        processes[0].send_signal(signal.SIGTERM)
        assert [process.wait(30) for process in processes] == [0, 0]
    with ranks(bundle) as (processes, url):
        processes[1].kill()
        wait_until(lambda: httpx2.post(f"{url}/v1/completions", json=body, timeout=60).status_code >= 500)
        answer = httpx2.post(f"{url}/v1/completions", json=body, timeout=60)
        assert "Rank 1" in answer.json()["error"]["message"]
        httpx2.post(f"{url}/v1/completions", json=body, timeout=60)
        assert httpx2.get(f"{url}/health").status_code == 503
