"""A bundle's graph in the form that TensorRT's parser takes it: no function bodies, and every weight a network input.

The bundle is not changed and nothing of its weights is read: only names, types and shapes count here.
"""

import onnx_ir as ir

from angelforge.errors import AngelForgeError
from angelforge.plugins.operator import DOMAIN, DOMAIN_VERSION, WEIGHT, Operator
from angelforge.plugins.registry import OPERATORS

ALL_REDUCE = "AllReduce"
_AGAIN = "Export the bundle again with this version of angelforge."


def prepare_network(model: ir.Model, ranks: int = 1) -> tuple[str, ...]:
    """Rewrites `model` in place for the parser; the graph is one that the exporter writes for `ranks` ranks.

    Returns the names of the weights, now network inputs.

    Raises:
        AngelForgeError: the graph has an operator, attribute, type or shape that the operators' definitions forbid.
    """
    check_operators(model)
    # The parser would expand function bodies rather than look for plugins, and fails on some of their operators.
    model.functions.clear()
    for node in list(model.graph):
        if node.domain == DOMAIN and node.op_type == ALL_REDUCE:
            _replace_all_reduce(model.graph, node, ranks)
        elif node.domain == DOMAIN:
            # Part of the name by which the parser looks a plugin up; without it the parser takes version 1.
            node.attributes["plugin_version"] = ir.AttrString("plugin_version", str(_operator(node).version))
    return _weights_to_inputs(model.graph)


def check_operators(model: ir.Model) -> None:
    """Compares every node of the domain with its operator's definition, and sets types and shapes of its outputs.

    Raises:
        AngelForgeError: naming the first node that does not fit, and why.
    """
    version = model.opset_imports.get(DOMAIN)
    if version != DOMAIN_VERSION:
        raise AngelForgeError(
            f"The graph's operators are of version {version}, this needs version {DOMAIN_VERSION}. {_AGAIN}"
        )
    for node in model.graph:
        if node.domain != DOMAIN:
            continue
        operator = _operator(node)
        wanted = [attribute.name for attribute in operator.attributes]
        if sorted(node.attributes) != sorted(wanted):
            raise AngelForgeError(
                f"{_name(node)} has the attributes {sorted(node.attributes)}, needed {sorted(wanted)}. {_AGAIN}"
            )
        values = {a.name: a.kind(node.attributes[a.name].value) for a in operator.attributes}
        try:
            typed = operator.infer([value for value in node.inputs if value is not None], values)
            for value, result in zip(node.outputs, typed, strict=True):
                value.type, value.shape = result.type, result.shape
        except (ValueError, KeyError, TypeError) as error:
            raise AngelForgeError(f"{_name(node)} does not fit its operator: {error}. {_AGAIN}") from error


def _operator(node: ir.Node) -> Operator:
    if node.op_type not in OPERATORS:
        raise AngelForgeError(f"{_name(node)} is of an operator that this version does not know. {_AGAIN}")
    return OPERATORS[node.op_type]


def _name(node: ir.Node) -> str:
    return f"The graph's node {node.name} ({node.op_type})"


def _replace_all_reduce(graph: ir.Graph, node: ir.Node, ranks: int) -> None:
    source, result = node.inputs[0], node.outputs[0]
    assert source is not None
    if ranks > 1:
        # Attributes as TensorRT's parser wants them; root −1: all ranks get the sum.
        text = {"collective_operation": "all_reduce", "reduce_op": "sum"}
        numbers = {"nb_rank": ranks, "root": -1}
        attributes = [ir.AttrString(k, v) for k, v in text.items()] + [ir.AttrInt64(k, v) for k, v in numbers.items()]
        collective = ir.Node("", "DistCollective", [source], attributes, num_outputs=1, name=node.name)
        graph.insert_before(node, collective)
        collective.outputs[0].type, collective.outputs[0].shape = result.type, result.shape
        source = collective.outputs[0]
    ir.convenience.replace_all_uses_with(result, source, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _weights_to_inputs(graph: ir.Graph) -> tuple[str, ...]:
    slices = [value for value in graph.inputs if WEIGHT in value.metadata_props]  # inputs already
    weights = dict(graph.initializers)
    graph.initializers.clear()
    known = set(graph.inputs)
    for weight in weights.values():
        weight.const_value = None
        if weight not in known:
            graph.inputs.append(weight)
    return (*weights, *(value.name for value in slices if value.name is not None))
