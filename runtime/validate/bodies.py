"""Runs an operator's function body in ONNX tools, as the truth that its kernel is compared with.

ONNX Runtime has no bf16 arithmetic on a CPU, only casts: `run_body` takes bf16 where the body widens at once (matmuls,
embedding); `run_reference` computes in bf16 node by node and serves the rest. onnx's own RMSNormalization ignores
`stash_type` and sums squares in bf16; the one here follows the standard.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime
from onnx import ModelProto
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from angelforge.plugins.operator import DOMAIN, DOMAIN_VERSION, IR_VERSION, OPSET, Operator

Attributes = Mapping[str, int | float]
_KINDS = {int: ir.AttributeType.INT, float: ir.AttributeType.FLOAT}


def body_model(operator: Operator, inputs: Sequence[np.ndarray], attributes: Attributes) -> ModelProto:
    """An ONNX model of one node of `operator`, its function body, and inputs of these shapes and types.

    bf16 outputs are widened to f32: ONNX Runtime cannot hand bf16 to NumPy.
    """
    values = [
        ir.val(port.name, dtype=ir.DataType.from_numpy(array.dtype), shape=array.shape)
        for port, array in zip(operator.inputs, inputs, strict=True)
    ]
    outputs = operator.infer(values, attributes)
    ordered = [ir.Attr(a.name, _KINDS[a.kind], a.kind(attributes[a.name])) for a in operator.attributes]
    nodes = [ir.Node(DOMAIN, operator.name, values, ordered, outputs=outputs)]
    results = []
    for port, value in zip(operator.outputs, outputs, strict=True):
        value.name = f"{port.name}_result"
        if value.dtype == ir.DataType.BFLOAT16:
            widened = ir.val(f"{port.name}_widened", dtype=ir.DataType.FLOAT, shape=value.shape)
            nodes.append(ir.Node("", "Cast", [value], [ir.AttrInt64("to", ir.DataType.FLOAT)], outputs=[widened]))
            value = widened
        results.append(value)
    graph = ir.Graph(values, results, nodes=nodes, opset_imports={"": OPSET, DOMAIN: DOMAIN_VERSION}, name="body")
    return ir.serde.serialize_model(ir.Model(graph, ir_version=IR_VERSION, functions=[operator.function()]))


def run_body(operator: Operator, inputs: Sequence[np.ndarray], attributes: Attributes) -> tuple[np.ndarray, ...]:
    """The body's outputs on ONNX Runtime's CPU provider; bf16 and FP8 as ml_dtypes arrays."""
    model = body_model(operator, inputs, attributes)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {
        value.name: onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, value.type.tensor_type.elem_type)
        for value, array in zip(model.graph.input, inputs, strict=True)
    }
    results = session.run_with_ort_values([value.name for value in model.graph.output], feeds)
    return _typed(operator, inputs, attributes, [value.numpy() for value in results])


class RMSNormalization(OpRun):  # type: ignore[misc]
    """The standard's definition: f32 inside (stash_type 1), cast to the type of x, then scaled in that type."""

    op_domain = ""

    def _run(self, x: Any, scale: Any, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1) -> tuple[Any]:
        assert axis == -1
        assert stash_type == ir.DataType.FLOAT
        wide = x.astype(np.float32)
        mean = np.mean(wide * wide, axis=-1, keepdims=True, dtype=np.float32)
        return ((wide / np.sqrt(mean + np.float32(epsilon))).astype(x.dtype) * scale,)


class _Evaluator(ReferenceEvaluator):  # type: ignore[misc]
    """onnx's evaluator, in functions too (it makes them by its own class) with the operator above."""

    def __init__(self, proto: Any, **options: Any) -> None:
        super().__init__(proto, **{**options, "new_ops": [RMSNormalization]})


def run_reference(operator: Operator, inputs: Sequence[np.ndarray], attributes: Attributes) -> tuple[np.ndarray, ...]:
    """The body's outputs in onnx's ReferenceEvaluator; bf16 and FP8 as ml_dtypes arrays."""
    model = body_model(operator, inputs, attributes)
    feeds = {value.name: array for value, array in zip(model.graph.input, inputs, strict=True)}
    with np.errstate(all="ignore"):
        return _typed(operator, inputs, attributes, _Evaluator(model).run(None, feeds))


def _typed(
    operator: Operator, inputs: Sequence[np.ndarray], attributes: Attributes, results: Sequence[Any]
) -> tuple[np.ndarray, ...]:
    types = operator.output_types([ir.DataType.from_numpy(array.dtype) for array in inputs], attributes)
    arrays = []
    for dtype, array in zip(types, results, strict=True):
        bits = dtype == ir.DataType.FLOAT8E4M3FN and array.dtype == np.uint8
        arrays.append(array.view(ml_dtypes.float8_e4m3fn) if bits else np.asarray(array).astype(dtype.numpy()))
    return tuple(arrays)
