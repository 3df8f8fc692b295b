"""Launches compiled kernels through the CUDA driver, on any stream and by raw pointers; needs no CUDA package."""

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

from angelforge.errors import AngelForgeError
from angelforge.plugins.kernel import Gpu
from angelforge.plugins.tensorrt.gpu import find_gpu
from angelforge.plugins.tensorrt.launches import Launch
from angelforge.plugins.tensorrt.ptx import SCRATCH_PARAMETERS

# CUfunction_attribute of cuda.h
_MAX_DYNAMIC_SHARED = 8
STATIC_SHARED = 48 * 1024  # bytes a block may have without asking for more


def launch(plan: Launch, inputs: Sequence[int], outputs: Sequence[int], stream: int) -> None:
    """Launches a kernel on `stream` of the current CUDA context; an empty grid launches nothing. Asynchronous.

    Raises:
        AngelForgeError: the driver refuses.
    """
    scratch = [ctypes.c_uint64(0) for _ in range(SCRATCH_PARAMETERS)]
    _launch(plan, plan.compiled.cubin, [*_arguments(plan, inputs, outputs), *scratch], stream)


def load(plan: Launch) -> None:
    """Loads a kernel in the current CUDA context, so that launching it need not.

    Raises:
        AngelForgeError: the driver refuses.
    """
    compiled = plan.compiled
    _function(_current_context(), compiled.cubin, compiled.entry, compiled.shared)


def launch_ptx(plan: Launch, ptx: str, inputs: Sequence[int], outputs: Sequence[int], stream: int) -> None:
    """Launches PTX of `plugin_ptx` as TensorRT's ahead-of-time plugins do: inputs, extras, outputs, nothing else.

    Raises:
        AngelForgeError: the driver refuses.
    """
    _launch(plan, ptx.encode(), _arguments(plan, inputs, outputs), stream)


def _arguments(plan: Launch, inputs: Sequence[int], outputs: Sequence[int]) -> list[Any]:
    return [
        *(ctypes.c_uint64(pointer) for pointer in inputs),
        *(ctypes.c_int32(extra) for extra in plan.extras),
        *(ctypes.c_uint64(pointer) for pointer in outputs),
    ]


def _launch(plan: Launch, image: bytes, values: list[Any], stream: int) -> None:
    """`image` is a cubin or PTX, with the plan's entry."""
    if 0 in plan.grid:
        return
    compiled = plan.compiled
    function = _function(_current_context(), image, compiled.entry, compiled.shared)
    arguments = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    block = (compiled.warps * 32, 1, 1)
    check(
        "launch",
        cuda_driver().cuLaunchKernel(
            function, *plan.grid, *block, compiled.shared, ctypes.c_void_p(stream), arguments, None
        ),
    )


def current_gpu() -> Gpu:
    """The device of the current CUDA context, as launch rules know it.

    Raises:
        AngelForgeError: there is no context.
    """
    device = ctypes.c_int()
    check("find the current device", cuda_driver().cuCtxGetDevice(ctypes.byref(device)))
    return _gpu(device.value)


@cache
def _gpu(device: int) -> Gpu:
    found = find_gpu(device)
    assert found is not None  # a context of it is current
    return Gpu(found.architecture, found.sms)


@cache
def cuda_driver() -> Any:
    """libcuda, with the argument types of what needs them.

    Raises:
        AngelForgeError: there is none.
    """
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise AngelForgeError("This machine has no NVIDIA driver (libcuda.so.1).") from error
    library.cuLaunchKernel.argtypes = [ctypes.c_void_p] + [ctypes.c_uint] * 7 + [ctypes.c_void_p] * 3
    library.cuFuncSetAttribute.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
    return library


def has_context() -> bool:
    """Whether a CUDA context is current in this thread; there is none on a machine without a driver."""
    context = ctypes.c_void_p()
    try:
        return cuda_driver().cuCtxGetCurrent(ctypes.byref(context)) == 0 and bool(context.value)
    except AngelForgeError:
        return False


def _current_context() -> int:
    context = ctypes.c_void_p()
    check("find the current context", cuda_driver().cuCtxGetCurrent(ctypes.byref(context)))
    if not context.value:
        raise AngelForgeError("No CUDA context is current in this thread, so no kernel can be launched.")
    return context.value


@cache
def _function(context: int, image: bytes, entry: str, shared: int) -> ctypes.c_void_p:
    """The loaded kernel; modules belong to a context and stay loaded."""
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    check("load a kernel", cuda_driver().cuModuleLoadData(ctypes.byref(module), image))
    check("find a kernel", cuda_driver().cuModuleGetFunction(ctypes.byref(function), module, entry.encode()))
    if shared > STATIC_SHARED:
        check("reserve shared memory", cuda_driver().cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED, shared))
    return function


def check(action: str, code: int) -> None:
    """Raises AngelForgeError for a CUDA error code: what failed, and CUDA's word for it."""
    if code:
        text = ctypes.c_char_p()
        cuda_driver().cuGetErrorString(code, ctypes.byref(text))
        said = text.value.decode() if text.value else "unknown error"
        raise AngelForgeError(f"CUDA cannot {action}: {said} (error {code}).")
