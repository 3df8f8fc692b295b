"""What the NVIDIA driver says about this machine's GPU, asked without any CUDA package."""

import ctypes
from dataclasses import dataclass

from angelforge.errors import AngelForgeError

# CUdevice_attribute of cuda.h
_MULTIPROCESSORS, _MAJOR, _MINOR = 16, 75, 76


@dataclass(frozen=True)
class GpuFacts:
    """One GPU and its driver."""

    name: str  # "NVIDIA H20"
    architecture: str  # "sm_90"
    sms: int  # streaming multiprocessors
    memory_bytes: int
    driver: str  # "580.65.06"


def find_gpu(index: int = 0) -> GpuFacts | None:
    """The GPU that CUDA counts as `index`, None on a machine without one or without a working driver."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device = ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), index):
        return None
    name = ctypes.create_string_buffer(256)
    memory = ctypes.c_size_t()
    if cuda.cuDeviceGetName(name, len(name), device) or cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device):
        return None

    def attribute(which: int) -> int:
        value = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(value), which, device)
        return value.value

    return GpuFacts(
        name=name.value.decode(errors="replace"),
        architecture=f"sm_{attribute(_MAJOR)}{attribute(_MINOR)}",
        sms=attribute(_MULTIPROCESSORS),
        memory_bytes=memory.value,
        driver=_driver_version(),
    )


def require_gpu() -> GpuFacts:
    """The first GPU.

    Raises:
        AngelForgeError: there is none.
    """
    found = find_gpu()
    if found is None:
        raise AngelForgeError(
            "This machine has no NVIDIA GPU, or its driver does not work (see angelforge doctor); TensorRT builds and "
            "runs engines only on the kind of GPU that they are for. To check a bundle without one, use --preflight."
        )
    return found


def newest_ptx() -> tuple[int, int] | None:
    """The newest PTX that this machine's driver compiles, that of its CUDA version ("Release Notes" of the PTX ISA).

    None without a driver.
    """
    version = ctypes.c_int()
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)):
            return None
    except OSError:
        return None
    major, minor = version.value // 1000, version.value % 1000 // 10
    return (major - 4, minor) if major != 12 or minor < 6 else (8, minor - 1)  # CUDA 12.5 and 12.6 share PTX 8.5


def _driver_version() -> str:
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return "unknown"
    version = ctypes.create_string_buffer(80)
    if library.nvmlInit_v2() or library.nvmlSystemGetDriverVersion(version, len(version)):
        return "unknown"
    library.nvmlShutdown()
    return version.value.decode(errors="replace")
