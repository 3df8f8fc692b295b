"""An FP8 bundle's graph without FP8: the same stored weights times their scales, no activation rounded."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from angelforge.bundle import Bundle
from angelforge.engines.widen import widen_activations
from angelforge.plugins.fp8_body import BLOCK
from angelforge.plugins.operator import DOMAIN
from angelforge.plugins.registry import OPERATORS, functions_used

# What computes the same without rounding, and how many of its outputs there are.
_PLAIN = {
    "NormQuantize": "Norm",
    "AddNormQuantize": "AddNorm",
    "AttentionMergeQuantize": "AttentionMerge",
    "Fp8Linear": "Linear",
    "Fp8GateUp": "GateUp",
    "Fp8MoEGateUp": "MoEGateUp",
    "Fp8MoEDown": "MoEDown",
}
_FLOAT = ir.DataType.FLOAT


def dequantized_graph(bundle: Bundle) -> ir.Model:
    """The target's graph in f32 throughout."""
    model = ir.load(bundle.folder / bundle.manifest.graphs["target"])
    widen_activations(model)
    plain: dict[ir.Value, ir.Value] = {}  # what stands for an e4m3 activation
    replaced = [node for node in model.graph if node.domain == DOMAIN and node.op_type in _PLAIN]
    for node in replaced:
        _replace(model.graph, node, plain)
    for node in reversed(replaced):  # from the end: what took their outputs is gone before they are
        model.graph.remove(node, safe=True)
    for function in functions_used(model.graph):
        model.functions[function.identifier()] = function
    return model


def _replace(graph: ir.Graph, node: ir.Node, plain: dict[ir.Value, ir.Value]) -> None:
    """Puts the plain operator in the place of one that reads or makes FP8."""
    weights = graph.initializers
    inputs: list[ir.Value] = []
    given = list(node.inputs)
    made: list[ir.Node] = []
    while given:
        value = given.pop(0)
        assert value is not None
        if value in plain:
            given.pop(0)  # its scales
            inputs.append(plain[value])
        elif value.name in weights and value.dtype == ir.DataType.FLOAT8E4M3FN:
            scale = given.pop(0)
            assert scale is not None
            made += _product(value, scale, f"{node.name}/{value.name}")
            inputs.append(made[-1].outputs[0])
        else:
            inputs.append(value)
    operator = OPERATORS[_PLAIN[node.op_type]]
    attributes = [node.attributes[attribute.name] for attribute in operator.attributes]
    new = ir.Node(DOMAIN, operator.name, inputs, attributes, num_outputs=len(operator.outputs), name=node.name)
    for old, value in zip(node.outputs, new.outputs, strict=False):
        value.name, value.dtype, value.shape = old.name, _FLOAT, old.shape
        old.name = f"{old.name}.rounded"
        if old.dtype == ir.DataType.FLOAT8E4M3FN:
            plain[old] = value
        else:
            ir.convenience.replace_all_uses_with(old, value)
    if "normed" in [port.name for port in operator.outputs]:  # its e4m3 form followed it
        plain[node.outputs[-2]] = new.outputs[-1]
    graph.insert_before(node, [*made, new])


def _product(weight: ir.Value, scale: ir.Value, name: str) -> list[ir.Node]:
    """Nodes that end in f32 weight [..., N, K] times scale [..., ⌈N/128⌉, ⌈K/128⌉]."""
    assert weight.shape is not None
    rows = weight.shape.numpy()[-2]
    blocks = ir.Node("", "Constant", [], num_outputs=1, name=f"{name}/rows")
    blocks.attributes["value"] = ir.AttrTensor("value", ir.tensor(np.arange(rows) // BLOCK))
    axis = len(weight.shape) - 2
    spread = ir.Node("", "Gather", [scale, blocks.outputs[0]], [ir.AttrInt64("axis", axis)], name=f"{name}/scales")
    sizes = [ir.AttrInt64("axis", axis + 1), ir.AttrInt64("block_size", BLOCK)]
    product = ir.Node("", "DequantizeLinear", [weight, spread.outputs[0]], sizes, name=f"{name}/product")
    nodes = [blocks, spread, product]
    for number, node in enumerate(nodes):
        node.outputs[0].name = f"{name}/{number}"
        node.outputs[0].dtype = _FLOAT if number else ir.DataType.INT64
    product.outputs[0].shape = weight.shape
    return nodes
