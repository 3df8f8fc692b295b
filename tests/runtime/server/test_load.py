"""Two hundred clients of every kind at once: right statuses, no page left, and memory that does not grow."""

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
from support.http_server import wait_until
from support.load import KINDS, load_round

CLIENTS = 200


@contextmanager
def process(bundle: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`angelforge serve` in a process of its own, and its address; it has to end in order when it is told to."""
    command = [
        sys.executable,
        "-m",
        "angelforge.tools",
        "serve",
        str(bundle),
        "--json",
        "--port",
        "0",
        "--threads",
        "1",
    ]
    command += ["--model-name", "toy", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            told = "".join(iter(server.stdout.readline, "}\n")) + "}"
            yield server, json.loads(told)["url"]
            server.send_signal(signal.SIGTERM)
            _, errors = server.communicate(timeout=60)
            assert (server.returncode, errors) == (0, "")
        finally:
            server.kill()


def metric(url: str, name: str) -> float:
    lines = httpx2.get(f"{url}/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith(f"angelforge_{name} ")).split()[-1])


def idle(url: str) -> bool:
    return not any(metric(url, name) for name in ("requests_running", "requests_waiting", "kv_pages_used"))


def resident(server: subprocess.Popen[str]) -> int:
    """Bytes of memory that the process has."""
    status = Path(f"/proc/{server.pid}/status").read_text()
    return 1024 * int(status.split("VmRSS:")[1].split()[0])


def rounds(bundle: Path, count: int, max_tokens: int) -> list[int]:
    """Rounds of load, each of which must end well; memory after each."""
    memory = []
    with process(bundle) as (server, url):
        port = int(url.rsplit(":", 1)[1])
        for seed in range(count):
            result = asyncio.run(load_round(port, CLIENTS, seed, max_tokens))
            assert result.wrong == []
            assert sum(result.answers.values()) == CLIENTS * (len(KINDS) - 1) // len(KINDS)
            wait_until(lambda: idle(url))
            assert httpx2.get(f"{url}/health").status_code == 200
            memory.append(resident(server))
    return memory


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_two_hundred_clients(toy: Path) -> None:
    first, second = rounds(toy, 2, 16)
    assert second - first < 30e6


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_two_hundred_clients_for_long(toy: Path) -> None:
    memory = rounds(toy, 12, 60)
    assert max(memory[6:]) - max(memory[2:6]) < 10e6


def test_more_than_it_takes(toy: Path) -> None:
    """With room for 40, the others get 429 at once; nothing else goes wrong."""
    with process(toy, "--max-requests", "40", "--max-batch", "4") as (_, url):
        result = asyncio.run(load_round(int(url.rsplit(":", 1)[1]), CLIENTS, 1, 8))
        busy = [line for line in result.wrong if "429 instead of 200" in line]
        assert busy == result.wrong
        assert busy
        assert any(status == 200 for _, status in result.answers)
        wait_until(lambda: idle(url))


def test_told_to_end_under_load(toy: Path) -> None:
    """Open requests may finish; what is not done by the deadline ends with an error, and the process with code 0."""
    body = {"model": "toy", "prompt": "Hello", "max_tokens": 400, "ignore_eos": True, "stream": True}
    ends = []
    for seconds in ("30", "0"):
        with (
            process(toy, "--drain-seconds", seconds) as (server, url),
            httpx2.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as stream,
        ):
            lines = stream.iter_lines()
            next(lines)
            server.send_signal(signal.SIGTERM)
            ends.append([line for line in lines if line][-2])
    assert '"finish_reason":"length"' in ends[0]
    assert "shutting down" in ends[1]
