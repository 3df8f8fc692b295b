"""A capture that fails says why, leaves torch as it was, and releases the allocator's pool exactly once."""

import re

import pytest
import torch
from support.cuda_calls import Cuda, failing

from angelforge.errors import AngelForgeError
from angelforge.runtime.cuda_graphs import capture
from angelforge.runtime.device import CudaDevice, explained_gpu

STREAM = 5
HIDING = RuntimeError("CUDA error: operation failed due to a previous error during capture\nmore")
REFUSED = RuntimeError("CUDA error: operation not permitted when stream is capturing\nSearch for it")
TOLD = ["_cuda_endAllocateToPool 7", "_cuda_releasePool 7", "reset"]  # of a graph that does not know its pool


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    found = Cuda()
    found.install(monkeypatch)
    return found


def test_a_capture_is_on_the_stream_that_is_given(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinned memory that nothing uses goes back to the system before, where torch can give it back."""
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: cuda.log.append("host"), raising=False)
    seen: list[int] = []
    _, result = capture(lambda: (seen.append(cuda.stream), "logits")[1], STREAM)
    assert (result, seen, cuda.stream, cuda.log) == ("logits", [STREAM], 0, ["host", "begin on 5", "end on 5"])


@pytest.mark.parametrize("error", [REFUSED, TypeError("x"), AngelForgeError("no"), KeyboardInterrupt()])
@pytest.mark.parametrize("end", [None, HIDING])
def test_the_first_error_is_raised(error: BaseException, end: Exception | None, cuda: Cuda) -> None:
    """Not what CUDA says when the capture is ended, which it is once."""
    cuda.end = end
    with pytest.raises(type(error)) as caught:
        capture(failing(error), STREAM)
    assert caught.value is error
    assert (cuda.stream, cuda.log[:2]) == (0, ["begin on 5", "end on 5"])
    assert cuda.log[2:] == (TOLD if end else ["reset with its pool"])
    cuda.end = None
    assert capture(lambda: 5, STREAM)[1] == 5


def test_what_begins_or_ends_wrongly_is_raised(cuda: Cuda) -> None:
    cuda.begin = RuntimeError("no capture here")
    with pytest.raises(RuntimeError, match="no capture here"):
        capture(lambda: None, STREAM)
    assert cuda.log == ["begin on 5", *TOLD]
    cuda.begin, cuda.end = None, RuntimeError("invalid capture")
    with pytest.raises(RuntimeError, match="invalid capture"):
        capture(lambda: None, STREAM)
    assert (cuda.stream, cuda.log[4:]) == (0, ["begin on 5", "end on 5", *TOLD])


def test_a_pool_is_not_released_twice(cuda: Cuda) -> None:
    """A graph that was captured but cannot be made runnable releases its pool by itself."""
    cuda.runnable = RuntimeError("CUDA error: out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        capture(lambda: None, STREAM)
    assert (cuda.stream, cuda.log) == (0, ["begin on 5", "end on 5", "reset with its pool"])


def test_another_torch_without_these_calls(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.delattr(torch._C, name)
    cuda.end = HIDING
    with pytest.raises(TypeError, match="odd"):
        capture(failing(TypeError("odd")), STREAM)
    assert cuda.log[2:] == ["reset"]


@pytest.fixture
def device() -> CudaDevice:
    return CudaDevice(torch.device("cuda:0"))


def test_a_step_is_put_on_its_stream_again(device: CudaDevice, cuda: Cuda) -> None:
    runs: list[int] = []
    replay = device.capture(lambda: runs.append(cuda.stream), STREAM)
    replay()
    assert (runs, cuda.replayed_on, cuda.stream) == ([STREAM], STREAM, 0)


@pytest.mark.parametrize("error", [REFUSED, AngelForgeError(str(REFUSED)), RuntimeError()])
def test_a_step_that_cannot_be_captured_is_explained(error: Exception, device: CudaDevice, cuda: Cuda) -> None:
    """By the first error, of torch or of TensorRT, with what to do."""
    cuda.end = HIDING
    first = (str(error) or "RuntimeError").splitlines()[0]
    told = f"A step cannot be captured in a CUDA graph: {first}. It runs, slower, with run --no-cuda-graphs"
    with pytest.raises(AngelForgeError, match=re.escape(told)) as caught:
        device.capture(failing(error), STREAM)
    assert (caught.value.__cause__, cuda.stream) == (error, 0)


def test_a_step_without_memory_is_not_one_that_cannot_be_captured(device: CudaDevice, cuda: Cuda) -> None:
    with pytest.raises(AngelForgeError, match="no memory left for a step: 2 GiB"), explained_gpu():
        device.capture(failing(torch.OutOfMemoryError("2 GiB")), STREAM)
    assert cuda.stream == 0
