"""Times launches by CUDA events over a CUDA graph: what a decode step pays, without Python in between."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from time import monotonic

import torch

from angelforge.tools.kernel_bench.capture import capture
from angelforge.tools.kernel_bench.statistics import Timing, rounds_for, summarise

REPLAYS = 12
STEP_WARM = 0.5  # seconds of work before a figure counts: an idle H200 runs at 345 MHz of 1980
CALL_WARM = 0.15  # of a single call, of which some hundred are measured one after another
BETWEEN = 8  # works between two looks at the clock
STREAM_BYTES = 2**31
STREAM_SHAPES = ((4096, 8, 4), (4096, 8, 8), (8192, 8, 4), (2048, 4, 8), (2048, 4, 16))  # int32 a block, warps, per SM


def time_calls(calls: Sequence[Callable[[], None]], warm: float = CALL_WARM) -> Timing:
    """Of one call, in µs. Each enqueues the same work on torch's current stream, on inputs of its own.

    The GPU is kept busy for `warm` seconds before. Raises what `capture` does, and what a call does.
    """
    for call in calls:  # compiles and loads whatever a capture may not
        call()
    torch.cuda.synchronize()
    estimate = max(1.0, elapsed(lambda: _all(calls, 1)) / len(calls))
    rounds = rounds_for(estimate, len(calls))
    graph, _ = capture(lambda: _all(calls, rounds))
    warm_up(graph.replay, warm)
    return summarise([time / (rounds * len(calls)) for time in spans(graph.replay, REPLAYS)])


def _all(calls: Sequence[Callable[[], None]], rounds: int) -> None:
    for _ in range(rounds):
        for call in calls:
            call()


def elapsed(work: Callable[[], None]) -> float:
    """µs on the GPU of what `work` puts on torch's current stream, the host's part included where the GPU waits."""
    start, end = _event(), _event()
    start.record()
    work()
    end.record()
    end.synchronize()
    return 1000.0 * float(start.elapsed_time(end))


def warm_up(work: Callable[[], object], seconds: float) -> None:
    """Repeats `work` for so long: a GPU that idles needs that to reach its clocks."""

    def some() -> None:
        for _ in range(BETWEEN):
            work()

    end = monotonic() + seconds
    while monotonic() < end:
        elapsed(some)


def spans(work: Callable[[], object], count: int, each: int = 1) -> list[float]:
    """µs of one `work`, the mean of `each` in each of `count` spans that follow one another without a pause.

    One more goes before: the GPU is busy with it while the host launches the first that counts.
    """
    work()
    marks = [_event() for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        for _ in range(each):
            work()
        mark.record()
    marks[-1].synchronize()
    return [1000.0 * float(start.elapsed_time(end)) / each for start, end in pairwise(marks)]


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def achievable_bandwidth(sms: int) -> float:
    """bytes/s of the best of several read-only kernels over 2 GiB."""
    from angelforge.plugins.device.streaming import read_all

    source = torch.ones(STREAM_BYTES // 4, dtype=torch.int32, device="cuda")
    best = 0.0
    for block, warps, per_sm in STREAM_SHAPES:
        programs = sms * per_sm
        sums = torch.empty(programs, dtype=torch.int32, device="cuda")

        def read(block: int = block, warps: int = warps, programs: int = programs, sums: torch.Tensor = sums) -> None:
            read_all[(programs,)](source, STREAM_BYTES // 4 // block, sums, block=block, num_warps=warps)

        best = max(best, STREAM_BYTES / (time_calls([read], STEP_WARM).median * 1e-6))
    return best
