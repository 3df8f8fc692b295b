"""Groups of ranks in tests: a process each, as torchrun would start them but without its own process and start-up."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TESTS = Path(__file__).parents[1]


def start_ranks(ranks: int, arguments: Sequence[str | Path]) -> list[subprocess.Popen[str]]:
    """Starts `rank_program.py` once for each rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "support.rank_program", str(ranks), *map(str, arguments)],
            cwd=TESTS,
            env={**os.environ, **shared, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]


def finish_ranks(processes: Sequence[subprocess.Popen[str]], seconds: float) -> list[tuple[int, str, str]]:
    """Code, output and errors of each, at most `seconds` from now; what is left then is killed and fails the test."""
    try:
        return [(process.wait(seconds), *process.communicate()) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
