"""Captures launches for a benchmark: on a stream that nothing else uses, with an error that fits a table."""

from collections.abc import Callable
from typing import TypeVar

import torch

from angelforge.errors import AngelForgeError
from angelforge.runtime import cuda_graphs
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
    stream = torch.cuda.Stream()  # one of its own, so that none is used again that a failure spoilt
    try:
        return cuda_graphs.capture(work, stream)
    except torch.cuda.OutOfMemoryError:
        raise
    except LAUNCH_ERRORS as error:
        raise CaptureError(f"It cannot be captured in a CUDA graph: {reason(error)}") from error
