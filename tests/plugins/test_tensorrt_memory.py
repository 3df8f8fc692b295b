"""Memory of a GPU for one run: what is cleared is clear before a stream that waits for no other one may write there."""

import ctypes
from typing import Any

import numpy as np
import pytest

from angelforge.plugins.tensorrt import driver, memory


class Driver:
    """What is called of libcuda. Clearing goes to the default stream and is done when that is waited for."""

    def __init__(self) -> None:
        self.pending: list[int] = []
        self.copied: list[int] = []
        self.at = 4096

    def cuMemAlloc_v2(self, pointer: Any, size: Any) -> int:  # noqa: N802 - CUDA's names
        pointer._obj.value, self.at = self.at, self.at + size.value
        return 0

    def cuMemsetD8_v2(self, pointer: Any, value: int, size: Any) -> int:  # noqa: N802
        self.pending.append(pointer.value)
        return 0

    def cuStreamSynchronize(self, stream: Any) -> int:  # noqa: N802
        if not (stream.value if isinstance(stream, ctypes.c_void_p) else stream):
            self.pending.clear()
        return 0

    def cuMemcpyHtoD_v2(self, pointer: Any, source: Any, size: Any) -> int:  # noqa: N802
        self.copied.append(pointer.value)
        return 0


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Driver:
    found = Driver()
    for module in (driver, memory):
        monkeypatch.setattr(module, "cuda_driver", lambda: found)
    return found


def test_outputs_are_clear_before_the_run_may_write_them(cuda: Driver) -> None:
    """The stream of the run does not wait for the default one, on which memory is cleared."""
    buffers = memory.GpuMemory(stream=9)
    first = buffers.zeros(1000)
    assert cuda.pending == []
    second = buffers.upload(np.arange(6))
    assert (cuda.pending, cuda.copied) == ([], [second])
    assert buffers.pointers == [first, second]
