"""torch's CUDA calls on a machine without a GPU: what they would do is done at once or written down.

A replay takes so many µs of a clock that only replays move; a stream is a name; a capture fails where it is told to.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count

import pytest
import torch


def failing(error: BaseException) -> Callable[[], None]:
    """Work that raises it."""

    def work() -> None:
        raise error

    return work


@dataclass
class Cuda:
    """What the calls saw."""

    replay: float = 500.0  # µs
    host: float = 0.0  # µs between a first event and the work, where the GPU was idle
    begin: Exception | None = None  # of a capture
    end: Exception | None = None
    runnable: Exception | None = None  # when a captured graph is made runnable, after its end
    now: float = 0.0
    idle: bool = True  # nothing was enqueued since the last wait
    stream: int = 0  # the current one
    replayed_on: int = 0  # that of the last replay
    log: list[str] = field(default_factory=list)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """In torch's place."""
        cuda, streams = self, count(1)

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.time = cuda.now

            def synchronize(self) -> None:
                cuda.idle = True

            def elapsed_time(self, other: "Event") -> float:
                return (other.time - self.time) / 1000

        @contextmanager
        def stream(number: int) -> Iterator[None]:
            before, cuda.stream = cuda.stream, number
            try:
                yield
            finally:
                cuda.stream = before

        for name, value in (
            ("Event", Event), ("CUDAGraph", type("CUDAGraph", (Graph,), {"cuda": cuda})), ("stream", stream),
            ("Stream", lambda: next(streams)),
            ("graph_pool_handle", lambda: (0, 7)), ("current_device", lambda: 0), ("synchronize", lambda: None),
            ("empty_cache", lambda: None),
        ):  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            release = lambda device, pool, name=name: cuda.log.append(f"{name} {pool[1]}")  # noqa: E731
            monkeypatch.setattr(torch._C, name, release, raising=False)


class Graph:
    """In `torch.cuda.CUDAGraph`'s place."""

    cuda: Cuda  # of the class that is installed
    mine = False  # the pool is the graph's to release

    def capture_begin(self, pool: object, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local"
        self.cuda.log.append(f"begin on {self.cuda.stream}")
        if self.cuda.begin:
            raise self.cuda.begin

    def capture_end(self) -> None:
        self.cuda.log.append(f"end on {self.cuda.stream}")
        if self.cuda.end:
            raise self.cuda.end
        self.mine = True
        if self.cuda.runnable:
            raise self.cuda.runnable

    def pool(self) -> tuple[int, int]:
        if not self.mine:
            raise RuntimeError("Called CUDAGraph::pool() without a preceding successful capture.")
        return (0, 7)

    def reset(self) -> None:
        self.cuda.log.append("reset" + " with its pool" * self.mine)
        self.mine = False

    def replay(self) -> None:
        self.cuda.now += self.cuda.replay + (self.cuda.host if self.cuda.idle else 0.0)
        self.cuda.idle = False
        self.cuda.log.append("replay")
        self.cuda.replayed_on = self.cuda.stream
