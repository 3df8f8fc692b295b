"""The bundle's graph on the project's own Triton kernels: onnx's ReferenceEvaluator with the kernels as its operators.

On a GPU they run there; without one in Triton's interpreter on the CPU, corrected as `plugins/device/interpreted.py`
says. Values keep the bundle's types.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from angelforge.bundle import Bundle
from angelforge.errors import AngelForgeError
from angelforge.plugins.kernel import Gpu
from angelforge.plugins.operator import DOMAIN
from angelforge.plugins.registry import OPERATORS
from angelforge.plugins.tensorrt.gpu import find_gpu
from angelforge.plugins.tensorrt.kernels import find_kernel
from angelforge.precision import Precision
from angelforge.runtime.validate.cutting import Array, Values, cut
from angelforge.runtime.validate.engine_graph import Unit
from angelforge.runtime.validate.operations import Operation
from angelforge.tensorfile import read_tensor

_INTERPRETED = Gpu("sm_90", 78)  # whose launch rules are followed without a GPU: an H20's
Launch = Callable[[Sequence[Array], Mapping[str, Any]], tuple[Array, ...]]


class KernelGraph:
    """The kernels under test, inside the graph."""

    as_stored = True

    def __init__(self, bundle: Bundle, replaced: Mapping[str, Launch] | None = None) -> None:
        """`replaced` gives other implementations for operators.

        Raises:
            AngelForgeError: torch or triton is missing, or the bundle is in f32, which no tensor core reads.
        """
        if bundle.manifest.precision is Precision.FP32:
            raise AngelForgeError(
                f"The bundle {bundle.folder} is in fp32, but the kernels read bf16 and FP8. Export it with --precision "
                "bf16 or fp8 to run them; the engine cpu runs fp32."
            )
        self._bundle = bundle
        self._model = ir.load(bundle.folder / bundle.manifest.graphs["target"])
        self._model.functions.clear()
        self._operators = kernel_operators(replaced or {})

    def units(self, operations: Sequence[Operation], whole: bool) -> Iterator[Unit]:
        """Pieces for `operations`, one for each or with `whole` one for all."""
        groups = [tuple(operations)] if whole else [(operation,) for operation in operations]
        for group in groups:
            made = {name for operation in group for name in operation.outputs}
            inputs = dict.fromkeys(n for operation in group for n in operation.inputs if n not in made)
            outputs = tuple(name for operation in group for name in operation.outputs)
            yield Unit(group, outputs, self.piece(list(inputs), outputs))

    def piece(self, inputs: Sequence[str], outputs: Sequence[str]) -> KernelPiece:
        """The part of the graph between these values; its weights are read now."""
        return KernelPiece(cut(self._model, inputs, outputs), self._bundle, self._operators)

    @property
    def input_types(self) -> dict[str, ir.DataType]:
        """Element types of the graph's inputs."""
        return {str(v.name): v.dtype for v in self._model.graph.inputs if v.dtype is not None}


class KernelPiece:
    """An evaluator of a piece; weights are held in memory."""

    def __init__(self, model: ir.Model, bundle: Bundle, operators: list[type[OpRun]]) -> None:
        graph = model.graph
        self._weights = {name: _lent(read_tensor(bundle.tensors[name])) for name in graph.initializers}
        graph.inputs.extend(v for v in graph.initializers.values() if not v.is_graph_input())
        graph.initializers.clear()
        self._inputs = [str(v.name) for v in graph.inputs if v.name not in self._weights]
        self.outputs = [str(v.name) for v in graph.outputs]
        self._evaluator = ReferenceEvaluator(ir.to_proto(model), new_ops=operators)

    def run(self, values: Values) -> dict[str, Array]:
        """Outputs for these values of the inputs."""
        given = {name: values[name] for name in self._inputs}
        return dict(zip(self.outputs, self._evaluator.run(self.outputs, {**given, **self._weights}), strict=True))


def kernel_operators(replaced: Mapping[str, Launch]) -> list[type[OpRun]]:
    """Classes for onnx's evaluator, one for each operator of the domain: its kernel, or what `replaced` names.

    Raises:
        AngelForgeError: torch or triton is missing.
    """
    launch = _launcher()

    def implementation(name: str) -> type[OpRun]:
        run: Launch = replaced.get(name) or (lambda inputs, attributes: launch(name, inputs, attributes))

        def _run(self: Any, *inputs: Array, **attributes: Any) -> tuple[Array, ...]:
            given = {a.name: a.kind(attributes[a.name]) for a in OPERATORS[name].attributes}
            return run(inputs, given)

        return type(name, (OpRun,), {"op_domain": DOMAIN, "_run": _run})

    return [implementation(name) for name in OPERATORS]


def _launcher() -> Callable[[str, Sequence[Array], Mapping[str, Any]], tuple[Array, ...]]:
    """What runs an operator's kernel on arrays, on the GPU or in the interpreter."""
    gpu = find_gpu()
    if gpu is None:
        # Triton decides when a kernel is imported; on a machine without a GPU it could not run in any other way.
        os.environ["TRITON_INTERPRET"] = "1"
    try:
        import torch

        from angelforge.plugins import run_kernel
        from angelforge.plugins.device.interpreted import exact_numbers
    except ModuleNotFoundError as error:
        raise AngelForgeError(
            f"The kernels need the Python package {error.name}: pip install 'angelforge[torch,triton]'."
        ) from error
    device = "cpu" if gpu is None else "cuda"
    facts = _INTERPRETED if gpu is None else Gpu(gpu.architecture, gpu.sms)

    def launch(name: str, inputs: Sequence[Array], attributes: Mapping[str, Any]) -> tuple[Array, ...]:
        if name == "AllReduce":  # of one rank
            return (inputs[0],)
        tensors = [_to_torch(torch, array).to(device) for array in inputs]
        with exact_numbers() if gpu is None else nullcontext():
            results = run_kernel.run(find_kernel(OPERATORS[name]), tensors, attributes, gpu=facts)
        return tuple(_to_numpy(torch, tensor.cpu()) for tensor in results)

    return launch


def _lent(array: Array) -> Array:
    """The same memory, marked as not to be written: a weight, C-contiguous, of which `_to_torch` makes no copy."""
    view = array.view()
    view.flags.writeable = False
    return view


def _is_lent(array: Array) -> bool:
    """Whether the array is a view that `_lent` has made."""
    owner = array.base
    if not isinstance(owner, np.ndarray) or array.flags.writeable or not owner.flags.writeable:
        return False
    return (owner.shape, owner.dtype, owner.strides) == (array.shape, array.dtype, array.strides)


def _owner(array: Array) -> Array:
    assert array.base is not None
    return array.base


def _to_torch(torch: Any, array: Array) -> Any:
    """A tensor of the array's type, in memory of its own but for weights: those are a layer's memory."""
    array = _owner(array) if _is_lent(array) else np.array(array, order="C")
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    if array.dtype == ml_dtypes.float8_e4m3fn:
        return torch.from_numpy(array.view(np.uint8)).view(torch.float8_e4m3fn)
    return torch.from_numpy(array)


def _to_numpy(torch: Any, tensor: Any) -> Array:
    if tensor.dtype == torch.bfloat16:
        return np.asarray(tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16))
    if tensor.dtype == torch.float8_e4m3fn:
        return np.asarray(tensor.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn))
    return np.asarray(tensor.numpy())
