"""Times launches by CUDA events over a CUDA graph: what a decode step pays, without Python in between."""

from collections.abc import Callable, Sequence

import torch

from angelforge.tools.kernel_bench.statistics import Timing, rounds_for, summarise

REPLAYS = 12
STREAM_BYTES = 2**31
STREAM_SHAPES = ((4096, 8, 4), (4096, 8, 8), (8192, 8, 4), (2048, 4, 8), (2048, 4, 16))  # int32 a block, warps, per SM


def time_calls(calls: Sequence[Callable[[], None]]) -> Timing:
    """Of one call, in µs. Each enqueues the same work on torch's current stream, on inputs of its own."""
    for call in calls:  # compiles and loads whatever a capture may not
        call()
    estimate = max(1.0, _elapsed(lambda: _all(calls, 1)) / len(calls))
    rounds = rounds_for(estimate, len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _all(calls, rounds)
    graph.replay()
    return summarise([_elapsed(graph.replay) / (rounds * len(calls)) for _ in range(REPLAYS)])


def _all(calls: Sequence[Callable[[], None]], rounds: int) -> None:
    for _ in range(rounds):
        for call in calls:
            call()


def _elapsed(work: Callable[[], None]) -> float:
    """µs on the GPU."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    end.synchronize()
    return 1000.0 * float(start.elapsed_time(end))


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

        best = max(best, STREAM_BYTES / (time_calls([read]).median * 1e-6))
    return best
