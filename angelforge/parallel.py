"""Runs tasks in threads while the caller's thread watches: the first failure, or Ctrl-C, ends all of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import TypeVar

T = TypeVar("T")

_TICK = 0.1  # seconds


def run_all(
    tasks: Sequence[Callable[[], T]], workers: int, stop: threading.Event, watch: Callable[[], None] | None = None
) -> list[T]:
    """The results of `tasks` in their order, `workers` at a time.

    `watch` is called every 0.1 s in the caller's thread. The first exception of a task or of `watch` sets `stop`, which
    long tasks look at, cancels those that wait, and is raised when all have ended. `stop` is always set at the end.
    """
    with ThreadPoolExecutor(workers) as pool:
        try:
            futures = [pool.submit(task) for task in tasks]
            pending: set[Future[T]] = set(futures)
            while pending:
                done, pending = wait(pending, timeout=_TICK, return_when=FIRST_EXCEPTION)
                if watch is not None:
                    watch()
                for future in done:
                    future.result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
    return [future.result() for future in futures]
