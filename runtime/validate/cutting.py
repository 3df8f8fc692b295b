"""Pieces of a graph on ONNX Runtime: cut out by the names of values, weights mapped from their files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray
from onnx_ir import convenience

from angelforge.engines.onnxruntime_graph import ONNXRUNTIME_ERRORS, fit_opset, session_options
from angelforge.errors import AngelForgeError
from angelforge.runtime.onnxruntime_device import CPU, Provider, open_session

Array = NDArray[Any]
Values = Mapping[str, Array]
_FP8 = ir.DataType.FLOAT8E4M3FN


def cut(
    model: ir.Model, inputs: Sequence[str], outputs: Sequence[str], types: Mapping[str, ir.DataType] | None = None
) -> ir.Model:
    """The part of `model` between values, as a model of its own; weights stay where they are.

    `types` are element types of inputs that the graph does not tell. Raises ValueError where `outputs` need more than
    `inputs`, or a name is unknown.
    """
    graph = convenience.extract(model.graph, list(inputs), list(outputs))
    for value in graph.inputs:
        if types is not None and value.dtype is None and value.name in types:
            value.dtype = types[str(value.name)]
    used = {(node.domain, node.op_type) for node in graph}
    functions = [f for f in model.functions.values() if (f.domain, f.name) in used]
    graph.opset_imports.update(model.opset_imports)
    return ir.Model(graph, ir_version=model.ir_version, functions=functions)


class OrtPiece:
    """A session of a piece; as it is built for one comparison, nothing of it is optimised."""

    def __init__(
        self, model: ir.Model, weights_root: Path, threads: int = 0, providers: Sequence[Provider] = (CPU,)
    ) -> None:
        """`weights_root` is the folder that the weights' locations are relative to.

        Raises:
            AngelForgeError: ONNX Runtime refuses the piece, or one of the providers does not start.
        """
        options = session_options(weights_root, threads)
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self.outputs = [str(value.name) for value in model.graph.outputs]
        fit_opset(model)
        self._types = {str(v.name): v.dtype for v in model.graph.inputs}
        graph = ir.to_proto(model).SerializeToString()
        self._session = open_session(graph, options, providers, "a piece of the graph")
        self._fp8 = {v.name for v in self._session.get_outputs() if v.type == "tensor(float8e4m3fn)"}

    def run(self, values: Values) -> dict[str, Array]:
        """The outputs for these values of the inputs; e4m3 as ml_dtypes.

        Raises:
            AngelForgeError: ONNX Runtime fails.
        """
        feeds = {name: ort_value(values[name], dtype) for name, dtype in self._types.items()}
        try:
            results = self._session.run_with_ort_values(self.outputs, feeds)
        except ONNXRUNTIME_ERRORS as error:
            raise AngelForgeError(f"ONNX Runtime failed in a piece of the graph: {error}") from error
        arrays = {name: value.numpy() for name, value in zip(self.outputs, results, strict=True)}
        return {name: _fp8_array(a) if name in self._fp8 else a for name, a in arrays.items()}


def ort_value(array: Array, dtype: ir.DataType | None) -> Any:
    """An OrtValue of the element type; e4m3 comes as bits or ml_dtypes."""
    array = np.ascontiguousarray(array)
    if dtype == _FP8 or array.dtype == ml_dtypes.float8_e4m3fn:
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint8), int(_FP8))
    if dtype is not None and array.dtype != dtype.numpy():
        array = array.astype(dtype.numpy())
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def _fp8_array(array: Array) -> Array:
    return array if array.dtype == ml_dtypes.float8_e4m3fn else array.view(ml_dtypes.float8_e4m3fn)
