"""Concrete shapes of all tensors of a graph at given sizes, and the sizes that TensorRT refuses."""

from collections.abc import Mapping
from math import prod

import onnx_ir as ir

from angelforge.errors import AngelForgeError
from angelforge.plugins.operator import DOMAIN
from angelforge.plugins.registry import OPERATORS

MAX_VOLUME = 2**31  # elements of a tensor: TensorRT's limit is below this
_DECIDED_BY = {"T": "--max-tokens", "B": "--max-batch", "P": "--max-context", "R": "--max-batch", "pages": "--pages"}
_TOO_WIDE = "The model is too wide for one rank; --tensor-parallel shares it."

Shape = tuple[int, ...]


def concrete_shapes(model: ir.Model, sizes: Mapping[str, int]) -> dict[ir.Value, Shape]:
    """Shapes of all tensors where the graph's symbols (T, B, pages, …) have these sizes.

    Tensors of standard nodes whose shape the graph does not say are left out, and what follows from them.
    """
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    shapes = {value: shape for value in values if (shape := _said(value, sizes)) is not None}
    for node in model.graph:
        if node.domain != DOMAIN:
            shapes |= {value: shape for value in node.outputs if (shape := _said(value, sizes)) is not None}
            continue
        operator = OPERATORS[node.op_type]
        if any(value not in shapes for value in node.inputs):
            continue
        bound = operator.bind([shapes[value] for value in node.inputs if value is not None])
        attributes = {a.name: a.kind(node.attributes[a.name].value) for a in operator.attributes}
        for value, shape in zip(node.outputs, operator.output_shapes({**bound, **attributes}), strict=True):
            shapes[value] = tuple(int(size) for size in shape)
    return shapes


def check_volumes(model: ir.Model, sizes: Mapping[str, int]) -> None:
    """Refuses tensors of 2³¹ elements or more.

    Raises:
        AngelForgeError: naming the first such tensor, its shape, and what to lower where an option decides it.
    """
    for value, shape in concrete_shapes(model, sizes).items():
        if prod(shape) < MAX_VOLUME:
            continue
        symbols = [str(d) for d in value.shape or () if not isinstance(d, int)]
        cause = f"Lower {' or '.join(_DECIDED_BY.get(name, name) for name in symbols)}." if symbols else _TOO_WIDE
        raise AngelForgeError(
            f"The tensor {value.name} would have {prod(shape)} elements (shape {list(shape)}), but TensorRT takes "
            f"fewer than {MAX_VOLUME}. {cause}"
        )


def _said(value: ir.Value, sizes: Mapping[str, int]) -> Shape | None:
    if value.shape is None:
        return None
    known = [d if isinstance(d, int) else sizes.get(str(d.value)) for d in value.shape]
    return None if any(size is None for size in known) else tuple(size for size in known if size is not None)
