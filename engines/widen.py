"""Rewrites a bf16 graph to f32 activations, for ONNX Runtime's CPU kernels, which have no bf16 arithmetic.

Weights keep their type: the function bodies widen them where they are used, so the weight files stay as they are.
"""

import onnx_ir as ir


def widen_activations(model: ir.Model) -> None:
    """Turns every bf16 activation and pool of `model` into f32, in place; initializers stay bf16."""
    graph = model.graph
    weights = set(graph.initializers.values())
    for node in graph:
        dtype = node.attributes.get("dtype")
        if dtype is not None and dtype.as_int() == ir.DataType.BFLOAT16:
            node.attributes["dtype"] = ir.AttrInt64("dtype", ir.DataType.FLOAT)
        for value in node.outputs:
            _widen(value)
    for value in graph.inputs:
        if value not in weights:
            _widen(value)


def _widen(value: ir.Value) -> None:
    if value.dtype == ir.DataType.BFLOAT16:
        value.dtype = ir.DataType.FLOAT
