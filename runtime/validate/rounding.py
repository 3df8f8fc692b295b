"""bf16 in a graph that is widened to f32: values are rounded where a graph in bf16 would round them.

Between operators that is every value that the bundle stores in bf16. Within bodies it is every cast to an activation's
type; sums of residual streams and norms are computed in that type without a cast.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from angelforge.plugins.operator import DOMAIN

_BF16, _FLOAT = ir.DataType.BFLOAT16, ir.DataType.FLOAT
_IN_ACTIVATION_TYPE = ("Norm", "AddNorm", "NormQuantize", "AddNormQuantize")


def round_as_stored(model: ir.Model, types: Mapping[str, ir.DataType]) -> None:
    """Changes a widened model in place; `types` are the types of its values as the bundle has them."""
    for node in list(model.graph):
        for value in node.outputs:
            if types.get(str(value.name)) == _BF16:
                _round(model.graph, node, value)
    for function in model.functions.values():
        if function.domain == DOMAIN:
            _round_inside(function)


def _round(graph: ir.Graph | ir.Function, node: ir.Node, value: ir.Value) -> None:
    """Everything that takes `value`, an output of `node`, takes it rounded, under its name."""
    name = str(value.name)
    users = [(use.node, use.idx) for use in value.uses()]
    narrow = ir.Node("", "Cast", [value], [ir.AttrInt64("to", _BF16)], num_outputs=1, name=f"{name}/round")
    wide = ir.Node("", "Cast", narrow.outputs, [ir.AttrInt64("to", _FLOAT)], num_outputs=1, name=f"{name}/widen")
    value.name, narrow.outputs[0].name = f"{name}.exact", f"{name}.bf16"
    narrow.outputs[0].dtype = _BF16
    result = wide.outputs[0]
    result.name, result.dtype, result.shape = name, _FLOAT, value.shape
    for user, index in users:
        user.replace_input_with(index, result)
    for index, output in enumerate(graph.outputs):
        if output is value:
            graph.outputs[index] = result
    graph.insert_after(node, [narrow, wide])


def _round_inside(function: ir.Function) -> None:
    inputs = set(function.inputs)
    in_type = function.name in _IN_ACTIVATION_TYPE
    for node in list(function):
        cast = node.op_type == "CastLike" and node.inputs[1] in inputs
        if cast or (in_type and node.op_type == "Add" and set(node.inputs) <= inputs):
            _round(function, node, node.outputs[0])
        elif in_type and node.op_type == "RMSNormalization":
            _round_norm(function, node)


def _round_norm(function: ir.Function, node: ir.Node) -> None:
    """x / √(mean(x²) + ε) is rounded, and its product with the weight again."""
    weight, normed = node.inputs[1], node.outputs[0]
    assert weight is not None
    one = ir.Node("", "Constant", [], num_outputs=1, name=f"{node.name}/one")
    one.attributes["value"] = ir.AttrTensor("value", ir.tensor(np.ones(1, np.float32)))
    one.outputs[0].name = f"{normed.name}.one"
    product = ir.Node("", "Mul", [normed, weight], num_outputs=1, name=f"{node.name}/weight")
    product.outputs[0].name = f"{normed.name}.weighed"
    users = [(use.node, use.idx) for use in normed.uses() if use.node is not product]
    for user, index in users:
        user.replace_input_with(index, product.outputs[0])
    for index, output in enumerate(function.outputs):
        if output is normed:
            function.outputs[index] = product.outputs[0]
    node.replace_input_with(1, one.outputs[0])
    function.insert_before(node, [one])
    function.insert_after(node, [product])
    _round(function, node, normed)
    _round(function, product, product.outputs[0])
