"""Launching a kernel through the CUDA driver: the argument list, seen by a driver that only writes down."""

import ctypes
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from support.tensorrt import rtx

from angelforge.errors import AngelForgeError
from angelforge.plugins import compile as compiling
from angelforge.plugins.compile import Compiled
from angelforge.plugins.kernel import Gpu
from angelforge.plugins.registry import OPERATORS
from angelforge.plugins.tensorrt import adapter, driver, launches
from angelforge.plugins.tensorrt.launches import Launch, tile_step
from angelforge.plugins.tensorrt.types import to_tensorrt

CODE = Compiled("add", "", b"cubin", warps=4, shared=1024, scratch=0)


class Driver:
    """What the launcher calls of libcuda."""

    def __init__(self) -> None:
        self.launches: list[dict[str, Any]] = []
        self.loaded: list[bytes] = []
        self.attributes: list[tuple[int, int]] = []
        self.code = 0

    def cuCtxGetCurrent(self, context: Any) -> int:  # noqa: N802 - CUDA's names
        context._obj.value = 77
        return 0

    def cuModuleLoadData(self, module: Any, image: bytes) -> int:  # noqa: N802
        self.loaded.append(image)
        module._obj.value = len(self.loaded)
        return 0

    def cuModuleGetFunction(self, function: Any, module: Any, name: bytes) -> int:  # noqa: N802
        function._obj.value = 1000 + module.value
        return 0

    def cuFuncSetAttribute(self, function: Any, which: int, value: int) -> int:  # noqa: N802
        self.attributes.append((which, value))
        return 0

    def cuGetErrorString(self, code: int, text: Any) -> int:  # noqa: N802
        text._obj.value = b"launch failure"
        return 0

    def cuLaunchKernel(self, function: Any, *rest: Any) -> int:  # noqa: N802
        sizes, shared, stream, arguments, extra = rest[:6], rest[6], rest[7], rest[8], rest[9]
        assert extra is None
        values = [ctypes.cast(pointer, ctypes.POINTER(ctypes.c_uint64))[0] for pointer in arguments]
        self.launches.append(
            {"function": function.value, "sizes": sizes, "shared": shared, "stream": stream.value, "arguments": values}
        )
        return self.code


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    found = Driver()
    monkeypatch.setattr(driver, "cuda_driver", lambda: found)
    driver._function.cache_clear()
    yield found
    driver._function.cache_clear()


def test_arguments_are_inputs_extras_outputs_and_scratch(cuda: Driver) -> None:
    """Pointers in 64 bits, extras in 32, and two nulls for the scratch pointers that Triton appends."""
    driver.launch(Launch(CODE, (5, 2, 1), (7, -1)), [2**40, 2**41], [2**42], stream=9)
    [launch] = cuda.launches
    assert (launch["sizes"], launch["shared"], launch["stream"]) == ((5, 2, 1, 128, 1, 1), 1024, 9)
    first, second, tokens, negative, result, *scratch = launch["arguments"]
    assert (first, second, result, scratch) == (2**40, 2**41, 2**42, [0, 0])
    assert (tokens & 0xFFFFFFFF, negative & 0xFFFFFFFF) == (7, 2**32 - 1)


def test_a_kernel_is_loaded_once(cuda: Driver) -> None:
    for _ in range(3):
        driver.launch(Launch(CODE, (1, 1, 1), ()), [1], [2], 0)
    assert (len(cuda.launches), cuda.loaded) == (3, [b"cubin"])


def test_an_empty_grid_launches_nothing(cuda: Driver) -> None:
    """CUDA refuses it, but a step may want no logits."""
    driver.launch(Launch(CODE, (0, 4, 1), ()), [1], [2], 0)
    assert cuda.launches == []


def test_more_shared_memory_is_asked_for(cuda: Driver) -> None:
    large = Compiled(**{**vars(CODE), "shared": 100_000})
    driver.launch(Launch(large, (1, 1, 1), ()), [1], [2], 0)
    assert cuda.attributes == [(driver._MAX_DYNAMIC_SHARED, 100_000)]


def test_cudas_refusal_is_told(cuda: Driver) -> None:
    cuda.code = 700
    with pytest.raises(AngelForgeError, match=r"CUDA cannot launch: launch failure \(error 700\)"):
        driver.launch(Launch(CODE, (1, 1, 1), ()), [1], [2], 0)


def test_a_plugin_launches_on_tensorrts_memory_and_stream(cuda: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """`enqueue` hands shapes, types and attributes to the launch rule, and raw pointers to the kernel; a step of the
    same shapes is not planned again."""
    api = rtx().api
    operator = OPERATORS["AddNorm"]
    planned: list[Any] = []

    def plan(*arguments: Any) -> Launch:
        planned.append(arguments)
        return Launch(CODE, (3, 1, 1), (3,))

    monkeypatch.setattr(adapter, "plan_launch", plan)
    monkeypatch.setattr(adapter, "current_gpu", lambda: Gpu("sm_90", 78))
    plugin: Any = adapter._creator_class(api).plugin_class(operator, {"epsilon": 1e-6})

    def desc(*shape: int) -> Any:
        made = api.PluginTensorDesc()
        made.dims, made.type = shape, to_tensorrt(api, ir.DataType.BFLOAT16)
        return made

    inputs, outputs = [desc(3, 8), desc(3, 8), desc(8)], [desc(3, 8), desc(3, 8)]
    for _ in range(2):
        plugin.enqueue(inputs, outputs, [100, 200, 300], [400, 500], 0, 42)
    [(found, shapes, types, attributes, most_tokens, gpu)] = planned
    assert (found, shapes, most_tokens, gpu) == (operator, ((3, 8), (3, 8), (8,)), None, Gpu("sm_90", 78))
    assert (set(types), attributes) == ({ir.DataType.BFLOAT16}, {"epsilon": 1e-6})
    assert [launch["arguments"][:3] + launch["arguments"][4:6] for launch in cuda.launches] == [
        [100, 200, 300, 400, 500]
    ] * 2
    assert {launch["stream"] for launch in cuda.launches} == {42}
    plugin.enqueue([desc(5, 8), desc(5, 8), desc(8)], [desc(5, 8), desc(5, 8)], [100, 200, 300], [400, 500], 0, 42)
    assert [arguments[1] for arguments in planned[1:]] == [((5, 8), (5, 8), (8,))]


def test_a_plugin_loads_its_kernel_before_it_is_launched(cuda: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA loads nothing while a stream is captured, and TensorRT may capture `enqueue` in order to time it."""
    api = rtx().api
    monkeypatch.setattr(adapter, "plan_launch", lambda *arguments: Launch(CODE, (3, 1, 1), (3,)))
    monkeypatch.setattr(adapter, "current_gpu", lambda: Gpu("sm_90", 78))
    plugin: Any = adapter._creator_class(api).plugin_class(OPERATORS["AddNorm"], {"epsilon": 1e-6})
    tensors = []
    for shape in ((3, 8), (3, 8), (8,), (3, 8), (3, 8)):
        tensors.append(api.PluginTensorDesc())
        tensors[-1].dims, tensors[-1].type = shape, to_tensorrt(api, ir.DataType.BFLOAT16)
    plugin.on_shape_change(tensors[:3], tensors[3:])
    assert (cuda.loaded, cuda.launches) == ([b"cubin"], [])
    plugin.enqueue(tensors[:3], tensors[3:], [100, 200, 300], [400, 500], 0, 42)
    assert (cuda.loaded, len(cuda.launches)) == ([b"cubin"], 1)


def test_a_build_without_a_gpu_loads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT for RTX builds on machines that have no driver."""

    def none() -> Any:
        raise AngelForgeError("This machine has no NVIDIA driver.")

    monkeypatch.setattr(driver, "cuda_driver", none)
    assert not driver.has_context()


def test_kernels_of_other_gpus_and_types_are_compiled_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear of equal sizes for two architectures, and with f32 and bf16 results; what is alike is compiled once."""
    compiled: list[tuple[str, ir.DataType]] = []

    def write_down(kernel: Any, binding: Any, tile: Any, architecture: str) -> Compiled:
        compiled.append((architecture, binding.types["y"]))
        return Compiled(f"linear{len(compiled)}", "", b"", tile.warps, 0, 0)

    monkeypatch.setattr(compiling, "compile_kernel", write_down)
    launches._compile.cache_clear()
    wanted = [(arch, kind) for arch in ("sm_90", "sm_100") for kind in (ir.DataType.FLOAT, ir.DataType.BFLOAT16)]
    shapes, types = [(4, 256), (512, 256)], [ir.DataType.BFLOAT16] * 2
    names = [
        launches.plan_launch(OPERATORS["Linear"], shapes, types, {"dtype": int(kind)}, 8, Gpu(arch, 78)).compiled.entry
        for arch, kind in [*wanted, *wanted]
    ]
    launches._compile.cache_clear()
    assert compiled == wanted
    assert names == [f"linear{i}" for i in (1, 2, 3, 4)] * 2


@pytest.mark.parametrize(("tokens", "step"), [(1, 8), (8, 8), (9, 64), (64, 64), (256, 256), (257, 257), (8192, 8192)])
def test_tiles_are_those_of_the_profiles(tokens: int, step: int) -> None:
    assert tile_step(tokens) == step
    assert np.iinfo(np.int32).max > step


def test_cut_ptx_is_launched_with_tensorrts_arguments(cuda: Driver) -> None:
    """Inputs, extras, outputs and nothing behind them; the PTX is what is loaded."""
    driver.launch_ptx(Launch(CODE, (2, 3, 1), (5,)), "ptx", [16, 32], [48], stream=9)
    (launch,) = cuda.launches
    assert cuda.loaded == [b"ptx"]
    assert [value & 0xFFFFFFFF for value in launch["arguments"]] == [16, 32, 5, 48]
    assert (launch["sizes"], launch["stream"]) == ((2, 3, 1, 128, 1, 1), 9)
