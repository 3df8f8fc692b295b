"""An FP8 bundle's graph without FP8: the same stored weights times their scales, no activation rounded."""

from __future__ import annotations

import onnx_ir as ir

from angelforge.bundle import Bundle
from angelforge.engines.widen import widen_activations
from angelforge.plugins.operator import DOMAIN
from angelforge.plugins.registry import OPERATORS, functions_used
from angelforge.runtime.validate.exact_operators import EXACT_DOMAIN, exact_function

# What computes the same without rounding: an operator of the bundle, or one that reads FP8 weights.
_PLAIN = {"NormQuantize": "Norm", "AddNormQuantize": "AddNorm", "AttentionMergeQuantize": "AttentionMerge"}
_EXACT = ("Fp8Linear", "Fp8GateUp", "Fp8MoEGateUp", "Fp8MoEDown")
_FLOAT, _FP8 = ir.DataType.FLOAT, ir.DataType.FLOAT8E4M3FN


def dequantized_graph(bundle: Bundle) -> ir.Model:
    """The target's graph in f32 throughout. Weights stay as they are stored; each is widened where it is used."""
    model = ir.load(bundle.folder / bundle.manifest.graphs["target"])
    widen_activations(model)
    plain: dict[ir.Value, ir.Value] = {}  # what stands for an e4m3 activation
    replaced = [node for node in model.graph if node.domain == DOMAIN and node.op_type in (*_PLAIN, *_EXACT)]
    for node in replaced:
        _replace(model.graph, node, plain)
    for node in reversed(replaced):  # from the end: what took their outputs is gone before they are
        model.graph.remove(node, safe=True)
    used = [exact_function(kind) for kind in _EXACT if any(node.op_type == kind for node in replaced)]
    for function in (*functions_used(model.graph), *used):
        model.functions[function.identifier()] = function
    model.opset_imports[EXACT_DOMAIN] = 1
    return model


def _replace(graph: ir.Graph, node: ir.Node, plain: dict[ir.Value, ir.Value]) -> None:
    """Puts what does not round in the place of an operator that reads or makes FP8."""
    inputs: list[ir.Value] = []
    given = list(node.inputs)
    while given:
        value = given.pop(0)
        assert value is not None
        if value in plain:
            given.pop(0)  # its scales
        inputs.append(plain.get(value, value))
    if node.op_type in _EXACT:
        new = ir.Node(EXACT_DOMAIN, node.op_type, inputs, num_outputs=1, name=node.name)
    else:
        operator = OPERATORS[_PLAIN[node.op_type]]
        attributes = [node.attributes[attribute.name] for attribute in operator.attributes]
        new = ir.Node(DOMAIN, operator.name, inputs, attributes, num_outputs=len(operator.outputs), name=node.name)
    for old, value in zip(node.outputs, new.outputs, strict=False):  # behind them, scales of e4m3 outputs are left
        value.name, value.dtype, value.shape = old.name, _FLOAT, old.shape
        old.name = f"{old.name}.rounded"
        if old.dtype == _FP8:
            plain[old] = value
        else:
            ir.convenience.replace_all_uses_with(old, value)
    if node.op_type in ("NormQuantize", "AddNormQuantize"):  # its e4m3 form followed what it normed
        plain[node.outputs[-2]] = new.outputs[-1]
    graph.insert_before(node, [new])
