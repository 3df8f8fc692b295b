"""Bytes of activations that are alive at each node of a graph: the memory plan that `inspect` draws."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import onnx_ir as ir

from angelforge.engines.shapes import concrete_shapes
from angelforge.plugins.operator import DOMAIN
from angelforge.plugins.registry import OPERATORS


@dataclass(frozen=True)
class LiveMemory:
    """For each node in order its name and the bytes that live while it runs. Inputs of the graph do not count."""

    nodes: tuple[str, ...]
    nbytes: tuple[int, ...]

    @property
    def peak(self) -> int:
        """The most bytes at once."""
        return max(self.nbytes, default=0)

    @property
    def peak_node(self) -> str:
        """The first node at which so many live."""
        return self.nodes[self.nbytes.index(self.peak)] if self.nodes else ""


def live_memory(model: ir.Model, sizes: Mapping[str, int]) -> LiveMemory:
    """What lives while each node of a prepared graph runs, at these sizes of T, B, pages, ….

    A tensor lives from the node that makes it to the last that reads it; outputs that share an input's memory take
    none. Tensors of unknown shape are left out.
    """
    shapes = concrete_shapes(model, sizes)
    nodes = list(model.graph)
    given = {*model.graph.inputs, *model.graph.outputs}
    last = {value: i for i, node in enumerate(nodes) for value in node.inputs if value is not None}
    live = [0] * len(nodes)
    for i, node in enumerate(nodes):
        for value in _own_outputs(node):
            if value in given or value not in shapes or value.dtype is None:
                continue
            nbytes = int(prod(shapes[value]) * value.dtype.itemsize)
            for j in range(i, last.get(value, i) + 1):
                live[j] += nbytes
    return LiveMemory(tuple(node.name or node.op_type for node in nodes), tuple(live))


def _own_outputs(node: ir.Node) -> list[ir.Value]:
    if node.domain != DOMAIN:
        return list(node.outputs)
    operator = OPERATORS[node.op_type]
    return [v for v, port in zip(node.outputs, operator.outputs, strict=True) if port.name not in operator.aliases]
