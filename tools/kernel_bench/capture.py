"""Captures launches in a CUDA graph so that a capture that fails says why, and leaves torch as it was.

`torch.cuda.graph` ends a capture whatever happened in it: CUDA's complaint about that then hides the first error, the
capture's stream stays the current one, and the allocator keeps its blocks for a capture that is over.
"""

from collections.abc import Callable
from typing import TypeVar

import torch

from angelforge.errors import AngelForgeError
from angelforge.tools.kernel_bench.failures import LAUNCH_ERRORS, reason

Result = TypeVar("Result")


class CaptureError(AngelForgeError):
    """Launches cannot be captured; the message has the first error, which is also the cause."""


def capture(work: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
    """(what `work` puts on torch's current stream, to be replayed; what it returns, filled by every replay).

    Whatever `work` compiles or loads must be there.

    Raises:
        CaptureError: `work` raises, or CUDA does not take it.
        torch.cuda.OutOfMemoryError: memory does not suffice.
    """
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    with torch.cuda.stream(torch.cuda.Stream()):  # one of its own, so that none is used again that a failure spoilt
        try:
            graph.capture_begin(pool=pool)
            result = work()
        except LAUNCH_ERRORS as error:
            _abandon(graph, pool)
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            raise CaptureError(f"It cannot be captured in a CUDA graph: {reason(error)}") from error
        try:
            graph.capture_end()
        except RuntimeError as error:
            _release(pool)
            raise CaptureError(f"It cannot be captured in a CUDA graph: {reason(error)}") from error
    return graph, result


def _abandon(graph: torch.cuda.CUDAGraph, pool: tuple[int, int]) -> None:
    """Ends the capture; what CUDA says of that follows from the error that is already known."""
    try:
        graph.capture_end()
    except RuntimeError:
        _release(pool)


def _release(pool: tuple[int, int]) -> None:
    """Tells the allocator that the capture is over; `capture_end` does so only where CUDA agrees with it."""
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        try:
            getattr(torch._C, name)(torch.cuda.current_device(), pool)
        except (RuntimeError, AttributeError):  # done already, or another version of torch: memory is lost, no result
            continue
