"""Memory of a GPU and a stream, through the CUDA driver: enough to run an engine once; needs no CUDA package."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from angelforge.plugins.tensorrt.driver import check, cuda_driver


class GpuMemory:
    """Buffers on one GPU, freed together."""

    def __init__(self, stream: int) -> None:
        self.stream = stream
        self.pointers: list[int] = []

    def zeros(self, nbytes: int) -> int:
        """The address of so many bytes of zeros, aligned to at least 256 bytes."""
        pointer = ctypes.c_uint64()
        check("allocate memory", cuda_driver().cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(max(nbytes, 256))))
        self.pointers.append(pointer.value)
        check("clear memory", cuda_driver().cuMemsetD8_v2(pointer, 0, ctypes.c_size_t(max(nbytes, 256))))
        # It is cleared on the default stream, and returns before; this one's stream would not wait for that.
        check("wait for the GPU", cuda_driver().cuStreamSynchronize(ctypes.c_void_p(None)))
        return pointer.value

    def upload(self, array: np.ndarray[Any, Any]) -> int:
        """The address of a copy of `array`, of any element type."""
        data = np.ascontiguousarray(array)
        pointer = self.zeros(data.nbytes)
        source = ctypes.c_void_p(data.ctypes.data)
        check("copy to the GPU", cuda_driver().cuMemcpyHtoD_v2(ctypes.c_uint64(pointer), source, _size(data)))
        return pointer

    def download(self, pointer: int, like: np.ndarray[Any, Any]) -> None:
        """Copies bytes at an address into `like`, which is contiguous."""
        check("wait for the GPU", cuda_driver().cuStreamSynchronize(ctypes.c_void_p(self.stream)))
        target = ctypes.c_void_p(like.ctypes.data)
        check("copy from the GPU", cuda_driver().cuMemcpyDtoH_v2(target, ctypes.c_uint64(pointer), _size(like)))


@contextmanager
def gpu_memory(device: int = 0) -> Iterator[GpuMemory]:
    """Makes the GPU's primary context current, with a stream, and gives all memory back at the end.

    Raises:
        AngelForgeError: no driver, no GPU, or the driver refuses.
    """
    cuda = cuda_driver()
    check("start", cuda.cuInit(0))
    handle, context, stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
    check("find the GPU", cuda.cuDeviceGet(ctypes.byref(handle), device))
    check("use the GPU", cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle))
    check("use the GPU", cuda.cuCtxSetCurrent(context))
    check("make a stream", cuda.cuStreamCreate(ctypes.byref(stream), 1))  # CU_STREAM_NON_BLOCKING
    memory = GpuMemory(stream.value or 0)
    try:
        yield memory
    finally:
        cuda.cuStreamSynchronize(stream)
        for pointer in memory.pointers:
            cuda.cuMemFree_v2(ctypes.c_uint64(pointer))
        cuda.cuStreamDestroy_v2(stream)
        cuda.cuDevicePrimaryCtxRelease_v2(handle)


def _size(array: np.ndarray[Any, Any]) -> ctypes.c_size_t:
    return ctypes.c_size_t(array.nbytes)
