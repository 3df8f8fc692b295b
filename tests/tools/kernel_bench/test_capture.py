"""A capture that fails says why; a time is of a GPU at its clocks, without the host."""

import pytest
import torch
from support.cuda_calls import Cuda, failing

from angelforge.errors import AngelForgeError
from angelforge.tools.kernel_bench import timing
from angelforge.tools.kernel_bench.capture import CaptureError, capture
from angelforge.tools.kernel_bench.failures import answers
from angelforge.tools.kernel_bench.timing import spans, time_calls, warm_up


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    found = Cuda()
    found.install(monkeypatch)
    return found


def test_a_capture_is_on_a_stream_of_its_own(cuda: Cuda) -> None:
    seen: list[int] = []
    graph, result = capture(lambda: (seen.append(cuda.stream), "logits")[1])
    graph.replay()
    assert (result, seen, cuda.stream) == ("logits", [1], 0)
    assert cuda.log == ["begin on 1", "end on 1", "replay"]


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: not permitted\nwhen"), TypeError("x"), OSError("no gcc")])
def test_the_first_error_of_a_capture_is_told(error: Exception, cuda: Cuda) -> None:
    """In a line, for a table; the next capture is on another stream."""
    cuda.end = RuntimeError("CUDA error: operation failed due to a previous error during capture\nmore")
    with pytest.raises(CaptureError) as caught:
        capture(failing(error))
    told = f"It cannot be captured in a CUDA graph: {type(error).__name__}: {str(error).splitlines()[0]}"
    assert (str(caught.value), caught.value.__cause__) == (told, error)
    assert isinstance(caught.value, AngelForgeError)
    cuda.end = None
    assert capture(lambda: 5)[1] == 5
    assert cuda.log[-1] == "end on 2"


def test_what_cuda_does_not_take_is_told(cuda: Cuda) -> None:
    cuda.end = RuntimeError("invalid capture")
    with pytest.raises(CaptureError, match="invalid capture"):
        capture(lambda: None)


def test_too_little_memory_stays_what_it_is(cuda: Cuda) -> None:
    with pytest.raises(torch.cuda.OutOfMemoryError, match="2 GiB"):
        capture(failing(torch.cuda.OutOfMemoryError("2 GiB")))


def test_spans_leave_out_what_the_host_needs(cuda: Cuda) -> None:
    """An idle GPU waits for a launch; behind another one it does not."""
    cuda.host = 90.0
    graph, _ = capture(lambda: None)
    assert spans(graph.replay, 3, each=4) == pytest.approx([500.0] * 3)
    assert cuda.log.count("replay") == 1 + 3 * 4


def test_a_gpu_is_warmed_up_before_a_time_counts(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first 100 replays are slow, as at the clocks of an idle GPU; the time is that of the later ones."""
    clock = iter(range(10**6))
    monkeypatch.setattr(timing, "monotonic", lambda: next(clock) / 100)  # 10 ms a look
    real = torch.cuda.CUDAGraph.replay

    def replay(graph: torch.cuda.CUDAGraph) -> None:
        cuda.replay = 3000.0 if cuda.log.count("replay") < 100 else 500.0
        real(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", replay)
    launches: list[int] = []
    found = time_calls([lambda: launches.append(1)])
    in_graph = len(launches) - 2  # one to load, one to estimate
    assert (found.median * in_graph, found.spread) == (pytest.approx(500.0), 0.0)
    assert cuda.log.count("replay") > 100
    before = cuda.log.count("replay")
    warm_up(torch.cuda.CUDAGraph().replay, 0.5)
    assert cuda.log.count("replay") - before == pytest.approx(8 * 50, abs=8)


def test_a_gpu_that_is_lost_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    assert answers("cpu")
    monkeypatch.setattr(torch.cuda, "synchronize", failing(RuntimeError("CUDA error: unspecified launch failure")))
    assert not answers("cuda")
