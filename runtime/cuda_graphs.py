"""Captures work in a CUDA graph so that a capture that fails says why, and leaves torch as it was.

`torch.cuda.graph` ends a capture whatever happened in it: CUDA's complaint about that then hides the first error, the
capture's stream stays the current one, and the allocator goes on filling a pool for a graph that is gone.
"""

from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")
Pool = Any  # torch.cuda._POOL_HANDLE


def capture(work: Callable[[], Result], stream: Any) -> tuple[torch.cuda.CUDAGraph, Result]:
    """(what `work` puts on `stream`, to be replayed; what it returns, filled by every replay).

    `stream` is not the default one; within `work` it is torch's current stream. Whatever `work` compiles or loads must
    be there. Other threads may go on using the device meanwhile. Raises what `work` raises; torch's error where CUDA
    does not take the capture.
    """
    torch.cuda.synchronize()
    _give_back()
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    with torch.cuda.stream(stream), ExitStack() as failed:
        failed.callback(_release, graph, pool)
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        with ExitStack() as within:
            within.callback(_end, graph)
            result = work()
            within.pop_all()
        graph.capture_end()
        failed.pop_all()
    return graph, result


def _give_back() -> None:
    """Gives the system what the allocators hold unused: a graph's pool takes none of it."""
    torch.cuda.empty_cache()
    of_host: Callable[[], None] | None = getattr(torch._C, "_host_emptyCache", None)  # in builds for CUDA
    if of_host is not None:
        of_host()


def _end(graph: torch.cuda.CUDAGraph) -> None:
    """Ends a capture that failed; what CUDA says of that follows from the error that is already known."""
    with suppress(RuntimeError):
        graph.capture_end()


def _release(graph: torch.cuda.CUDAGraph, pool: Pool) -> None:
    """Tells the allocator that the capture is over, once: its pool is the graph's to release if the graph knows it.

    `capture_end` tells nothing where CUDA refuses to end, half where there is no graph then, and all where only making
    it runnable failed. A pool that is released twice ends the process when the graph goes.
    """
    try:
        graph.pool()
    except RuntimeError:
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            with suppress(RuntimeError, AttributeError):  # done already, or another torch: memory is lost, no result
                getattr(torch._C, name)(torch.cuda.current_device(), pool)
    graph.reset()
