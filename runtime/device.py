"""Memory, streams and captured work of one device, over torch: a GPU, or a CPU, which does the same at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from angelforge.errors import AngelForgeError
from angelforge.runtime import cuda_graphs
from angelforge.runtime.memory import free_memory

ALIGNMENT = 256  # bytes; what TensorRT asks of every address


def open_device(name: str) -> Device:
    """The device "cuda:0" and so on, or "cpu".

    Raises:
        AngelForgeError: torch cannot use it.
    """
    device = torch.device(name)
    if device.type == "cpu":
        return Device(device)
    try:
        torch.cuda.init()
        torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        raise AngelForgeError(
            f"torch {torch.__version__} cannot use the GPU: {str(error).splitlines()[0]}. Install a torch for CUDA 13 "
            "and driver 580 or newer; angelforge doctor says what is here."
        ) from error
    return CudaDevice(device)


class Device:
    """A CPU in a GPU's place: pinned memory is ordinary memory, copies are done when they return, work is not captured.

    The loader, the engine and the sampler run on it as they run on a GPU, so that all but TensorRT's own calls can be
    tested without one.
    """

    def __init__(self, device: torch.device) -> None:
        self.torch = device

    def allocate(self, nbytes: int) -> torch.Tensor:
        """So many bytes, uint8, aligned to 256; their content is arbitrary. Raises AngelForgeError without memory."""
        try:
            raw = torch.empty(max(nbytes, 1) + ALIGNMENT, dtype=torch.uint8, device=self.torch)
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
            have = self.free_bytes()
            raise AngelForgeError(
                f"The device has no room for {nbytes / 1e9:.2f} GB; {have / 1e9:.2f} GB are free. End other programs "
                "that use it, or take less for the KV cache."
            ) from error
        begin = -raw.data_ptr() % ALIGNMENT
        return raw[begin : begin + nbytes]

    def staging(self, nbytes: int) -> torch.Tensor:
        """Host memory that the device copies from by itself, uint8."""
        return torch.empty(nbytes, dtype=torch.uint8)

    def free_bytes(self) -> int:
        """Memory that can still be taken."""
        return free_memory()

    def bound(self) -> AbstractContextManager[Any]:
        """Within it, this thread's CUDA calls go to the device: each thread begins with the first GPU."""
        return nullcontext()

    def stream(self) -> Any:
        """A queue of work beside others; None where there are no such queues."""
        return None

    def handle(self, stream: Any) -> int:
        """The `cudaStream_t` of a stream, for TensorRT."""
        return 0

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """Within it, torch puts its work on `stream`."""
        return nullcontext()

    def mark(self, stream: Any) -> Any:
        """An event of all that was put on `stream` so far, for `wait`."""
        return None

    def wait(self, event: Any) -> None:
        """Lets this thread wait for an event of `mark`."""

    def follow(self, stream: Any, other: Any) -> None:
        """Lets `stream` go on only after all that was put on `other` so far; None is torch's current stream."""

    def capture(self, work: Callable[[], None], stream: Any) -> Callable[[], None]:
        """What `work` puts on `stream`, to be put there again by calling the result. Raises what `work` raises."""
        return work


class CudaDevice(Device):
    """An NVIDIA GPU."""

    def staging(self, nbytes: int) -> torch.Tensor:
        """Pinned host memory."""
        try:
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            raise AngelForgeError(
                f"The system does not give {nbytes / 1e6:.0f} MB of pinned memory (ulimit -l?)."
            ) from error

    def free_bytes(self) -> int:
        """What the driver calls free, and what torch holds without using it."""
        free, _ = torch.cuda.mem_get_info(self.torch)
        unused = torch.cuda.memory_reserved(self.torch) - torch.cuda.memory_allocated(self.torch)
        return int(free) + int(unused)

    def bound(self) -> AbstractContextManager[Any]:
        """`torch.cuda.device`."""
        return bound_to(self.torch)

    def stream(self) -> Any:
        """A stream of its own."""
        return torch.cuda.Stream(self.torch)

    def handle(self, stream: Any) -> int:
        """The `cudaStream_t`."""
        return int(stream.cuda_stream)

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """`torch.cuda.stream`."""
        return torch.cuda.stream(stream)

    def mark(self, stream: Any) -> Any:
        """A recorded event."""
        return stream.record_event()

    def wait(self, event: Any) -> None:
        """Blocks; raises AngelForgeError where the work before it failed."""
        with explained_gpu():
            event.synchronize()

    def follow(self, stream: Any, other: Any) -> None:
        """By an event, without blocking the host."""
        current = torch.cuda.current_stream(self.torch)
        (current if stream is None else stream).wait_stream(current if other is None else other)

    def capture(self, work: Callable[[], None], stream: Any) -> Callable[[], None]:
        """A CUDA graph. Other threads may go on using the device meanwhile.

        Raises:
            AngelForgeError: something in `work` cannot be captured; the first error is told.
            torch.OutOfMemoryError: memory does not suffice.
        """
        try:
            graph, _ = cuda_graphs.capture(work, stream)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, AngelForgeError) as error:
            raise AngelForgeError(
                f"A step cannot be captured in a CUDA graph: {_first_line(error)}. It runs, slower, with "
                "run --no-cuda-graphs or LLM(cuda_graphs=False); please report this."
            ) from error

        def replay() -> None:
            with torch.cuda.stream(stream):
                graph.replay()

        return replay


def bound_to(device: torch.device) -> AbstractContextManager[Any]:
    """Within it, this thread's CUDA calls, Triton's launches among them, go to a GPU; nothing for a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@contextmanager
def explained_gpu() -> Iterator[None]:
    """Turns torch's errors of the block into an AngelForgeError; those of earlier work come up where it is awaited."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise AngelForgeError(
            f"The GPU has no memory left for a step: {_first_sentence(error)}. End other programs that use it, or take "
            "less for the KV cache (--kv-memory-gb)."
        ) from error
    except RuntimeError as error:
        raise AngelForgeError(
            f"The GPU failed in a step: {_first_line(error)}. Start again; if it happens again, please report "
            "this with the output of angelforge doctor --deep."
        ) from error


def to_host(tensor: torch.Tensor) -> Any:
    """A tensor's values as a NumPy array, after all work before it; raises AngelForgeError where that work failed."""
    with explained_gpu():
        return tensor.cpu().numpy()


def _first_line(error: RuntimeError | AngelForgeError) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")


def _first_sentence(error: RuntimeError) -> str:
    """Torch goes on with figures of its allocator."""
    return _first_line(error).split(". ")[0]
