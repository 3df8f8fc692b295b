"""The target's graph on the project's kernels, launched one after another in the graph's order; nothing is waited for.

On a GPU a CUDA graph captures the launches; in Triton's interpreter the same code computes on a CPU, which is how it
is tested. A value is let go after its last use: torch's allocator gives its memory to the next.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import onnx_ir as ir
import torch

from angelforge.errors import AngelForgeError
from angelforge.plugins import run_kernel
from angelforge.plugins.kernel import Gpu, Kernel
from angelforge.plugins.operator import DOMAIN
from angelforge.plugins.registry import OPERATORS
from angelforge.plugins.tensorrt.kernels import find_kernel
from angelforge.plugins.tuning import tile_for, tile_step

Values = dict[str, torch.Tensor]
_LAYER = re.compile(r"\blayers\.(\d+)\.")


@dataclass(frozen=True, eq=False)
class Call:
    """One node's launch on its tensors; `launch` repeats it."""

    operator: str
    layer: int | None  # None: before or behind the layers
    inputs: tuple[torch.Tensor, ...]
    outputs: tuple[torch.Tensor, ...]
    attributes: Mapping[str, int | float]
    launch: Callable[[], None] | None  # None: the node costs nothing on one GPU


@dataclass(frozen=True, eq=False)
class _Node:
    operator: str
    layer: int | None
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, int | float]
    kernel: Kernel | None
    released: tuple[str, ...]  # values that no later node reads


class StepGraph:
    """A graph's nodes, ready to be launched."""

    def __init__(self, model: ir.Model, gpu: Gpu) -> None:
        """Kernels are imported now.

        Raises:
            AngelForgeError: triton is missing, or the graph has a node that there is nothing for.
        """
        self._gpu = gpu
        self._nodes = _prepared(model.graph)

    @property
    def launches(self) -> int:
        """Of one step."""
        return sum(_launched(node.operator) for node in self._nodes)

    @property
    def launches_by_layer(self) -> list[int]:
        """Of each layer."""
        layers = [node.layer for node in self._nodes if node.layer is not None and _launched(node.operator)]
        return [layers.count(layer) for layer in range(max(layers, default=-1) + 1)]

    def walk(self, values: Mapping[str, torch.Tensor], launching: bool = True) -> Iterator[Call]:
        """Launches node after node on these inputs, weights and pools; yields each after its launch.

        Without `launching` outputs get shapes and types alone: tensors may then be on the device "meta".

        A call holds its tensors: who keeps calls keeps memory. The last call's first output are the logits.
        """
        own = dict(values)
        for node in self._nodes:
            inputs = tuple(own[name] for name in node.inputs)
            outputs, launch = self._bound(node, inputs)
            if launching and launch is not None:
                launch()
            own.update(zip(node.outputs, outputs, strict=True))
            for name in node.released:
                del own[name]
            yield Call(node.operator, node.layer, inputs, outputs, node.attributes, launch)
            del inputs, outputs, launch

    def run(self, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """One step: logits f32 [R, vocab]; the pools are written in place."""
        for call in self.walk(values):
            logits = call.outputs[0]
        return logits

    def _bound(
        self, node: _Node, inputs: tuple[torch.Tensor, ...]
    ) -> tuple[tuple[torch.Tensor, ...], Callable[[], None] | None]:
        """Outputs, uninitialised, and what computes them."""
        if node.operator == "AllReduce":  # of one rank
            return inputs, None
        if node.kernel is None:  # Gather along the first axis, with indices as the batch has them
            data, indices = inputs
            gathered = torch.empty((indices.shape[0], *data.shape[1:]), dtype=data.dtype, device=data.device)
            return (gathered,), partial(_gather, data, indices, gathered)
        binding = run_kernel.bind_tensors(node.kernel, inputs, node.attributes)
        tile = tile_for(node.kernel, binding.dims, self._gpu, tile_step(binding.dims.get("T", 1)))
        outputs = run_kernel.allocate(node.kernel, inputs, binding)
        return outputs, partial(run_kernel.launch, node.kernel, inputs, outputs, binding, self._gpu, tile)


def _launched(operator: str) -> bool:
    return operator != "AllReduce"


def _gather(data: torch.Tensor, indices: torch.Tensor, out: torch.Tensor) -> None:
    torch.index_select(data, 0, indices, out=out)


def _prepared(graph: ir.Graph) -> list[_Node]:
    """The nodes in the graph's order, which is topological."""
    nodes = list(graph)
    kept = {str(value.name) for value in (*graph.inputs, *graph.outputs, *graph.initializers.values())}
    last: dict[str, int] = {}
    for index, node in enumerate(nodes):
        for name in _names(node):
            last[name] = index
    released: list[list[str]] = [[] for _ in nodes]
    for name, index in last.items():
        if name not in kept:
            released[index].append(name)
    return [_prepare(node, tuple(names)) for node, names in zip(nodes, released, strict=True)]


def _names(node: ir.Node) -> list[str]:
    return [str(value.name) for value in (*node.inputs, *node.outputs) if value is not None]


def _prepare(node: ir.Node, released: tuple[str, ...]) -> _Node:
    attributes, kernel = _supported(node)
    outputs = tuple(str(value.name) for value in node.outputs)
    found = _LAYER.search(outputs[0])
    return _Node(
        operator=node.op_type,
        layer=int(found.group(1)) if found else None,
        inputs=tuple(str(value.name) for value in node.inputs if value is not None),
        outputs=outputs,
        attributes=attributes,
        kernel=kernel,
        released=released,
    )


def _supported(node: ir.Node) -> tuple[dict[str, int | float], Kernel | None]:
    """A node's attributes and kernel; raises AngelForgeError for one that nothing here computes."""
    if node.domain == DOMAIN and node.op_type in OPERATORS:
        operator = OPERATORS[node.op_type]
        attributes = {a.name: a.kind(node.attributes[a.name].value) for a in operator.attributes}
        return attributes, None if node.op_type == "AllReduce" else find_kernel(operator)
    axis = node.attributes.get("axis")
    if node.domain == "" and node.op_type == "Gather" and (axis is None or axis.as_int() == 0):
        return {}, None
    raise AngelForgeError(
        f"The graph has a node {node.domain or 'ai.onnx'}.{node.op_type} ({node.name}), but a step that is launched "
        "kernel by kernel has only operators of the domain angelforge, and Gather along the first axis."
    )
