"""Replicas on Ray Serve, on this machine's CPUs: one address, and a replica that is killed under load."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from support.http_server import build_toy

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray Serve: pip install 'angelforge[ray]'"),
]
WORKER = "ServeReplica:angelforge:Replica"  # as Ray names the processes of replicas


class Replicas:
    """A running `angelforge serve --replicas 2`."""

    def __init__(self, bundle: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "angelforge.tools", "serve", str(bundle), "--replicas", "2", "--json"]
        command += ["--port", str(port), "--model-name", "toy", "--drain-seconds", "5"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        text = ""
        while not text.rstrip().endswith("}"):  # the one object that is printed once requests are answered
            line = self.process.stdout.readline()
            assert line, "the server ended before it answered"
            text += line
        self.url: str = json.loads(text)["url"]

    def workers(self) -> list[int]:
        """Processes of the replicas below this server."""
        return [pid for pid in processes(WORKER) if self.process.pid in ancestors(pid)]

    def complete(self, prompt: str, stream: bool = False, tokens: int = 150) -> tuple[int, str]:
        """Status and text of a completion; status 0 for an answer that broke off."""
        body = {"model": "toy", "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
        request = urllib.request.Request(
            f"{self.url}/v1/completions",
            json.dumps({**body, "stream": stream}).encode(),
            {"content-type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except (OSError, HTTPException):
            return 0, ""

    def end(self) -> int:
        """Ends it in order; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(90)


def processes(name: str) -> list[int]:
    """Processes whose command line holds `name`."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if name.encode() in (folder / "cmdline").read_bytes():
                    found.append(int(folder.name))
            except OSError:
                continue
    return found


def ancestors(pid: int) -> set[int]:
    """The parents of a process, and theirs."""
    found: set[int] = set()
    while pid > 1:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            break
        pid = int(stat.rpartition(")")[2].split()[1])
        found.add(pid)
    return found


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replicas]:
    running = Replicas(build_toy(tmp_path_factory.mktemp("toy")))
    yield running
    workers = running.workers()
    assert running.end() == 0
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]


def text_of(answer: str) -> Any:
    return json.loads(answer)["choices"][0]["text"]


def test_one_address_answers_for_all(replicas: Replicas) -> None:
    """Prompts of many kinds get the same answers, streamed or not, whoever answers; nonsense gets its status."""
    assert len(replicas.workers()) == 2
    for caller in range(6):
        prompt = f"caller {caller}: I cough."
        status, whole = replicas.complete(prompt)
        assert status == 200
        status, stream = replicas.complete(prompt, stream=True)
        events = [line[6:] for line in stream.splitlines() if line.startswith("data: ")]
        assert (status, events[-1]) == (200, "[DONE]")
        assert "".join(json.loads(e)["choices"][0]["text"] for e in events[:-1] if json.loads(e)["choices"]) == text_of(
            whole
        )
    assert replicas.complete("x" * 5000)[0] == 400
    assert json.load(urllib.request.urlopen(f"{replicas.url}/health", timeout=30)) == {"status": "ok"}


def test_a_replica_dies_under_load(replicas: Replicas) -> None:
    """What it had not begun to answer is answered by the other; what it had begun breaks off; it is replaced."""
    before = {f"caller {i}: ": text_of(replicas.complete(f"caller {i}: ")[1]) for i in range(8)}
    victim = replicas.workers()[0]
    with ThreadPoolExecutor(24) as pool:
        plain = [pool.submit(replicas.complete, f"caller {i % 8}: ") for i in range(16)]
        streams = [pool.submit(replicas.complete, f"caller {i}: ", True) for i in range(8)]
        time.sleep(0.5)
        os.kill(victim, signal.SIGKILL)
        answers = [future.result() for future in plain]
        streamed = [future.result() for future in streams]
    # Answers that are not streamed begin when they are complete: none may be lost, and none differs.
    assert [status for status, _ in answers] == [200] * 16
    assert [text_of(text) for _, text in answers] == [before[f"caller {i % 8}: "] for i in range(16)]
    assert {status for status, _ in streamed} <= {200, 0}
    assert all("[DONE]" in text for status, text in streamed if status == 200)
    deadline = time.monotonic() + 90
    while len(set(replicas.workers()) - {victim}) < 2:
        assert time.monotonic() < deadline, "the dead replica was not replaced"
        time.sleep(0.5)
    assert replicas.complete("caller 3: ")[0] == 200


def test_prompts_that_begin_alike_meet(replicas: Replicas) -> None:
    """The second of two requests with one long begin finds the first one's pages, whichever replica that was."""
    for caller in range(6):
        begin = f"caller {caller} says: " + "I feel dizzy and I have a headache. " * 8
        counts = []
        for end in ("When?", "Why?"):
            status, answer = replicas.complete(begin + end, tokens=4)
            assert status == 200
            counts.append(json.loads(answer)["usage"]["prompt_tokens_details"]["cached_tokens"])
        assert counts[0] == 0
        assert counts[1] >= 64
