"""What a call of an operator fixes: the sizes of its symbols and the element types of its ports."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from angelforge.plugins.operator import Operator


@dataclass(frozen=True)
class Binding:
    """Symbols, types and output shapes of one call, or of all calls of a plugin when sizes are symbolic expressions."""

    dims: Mapping[str, Any]  # the operator's symbols, derived ones included, with attributes beside them
    types: Mapping[str, ir.DataType]  # of every port, by its name
    output_shapes: tuple[tuple[Any, ...], ...]


def bind(
    operator: Operator,
    shapes: Sequence[Sequence[Any]],
    types: Sequence[ir.DataType],
    attributes: Mapping[str, int | float],
) -> Binding:
    """Binds an operator to the shapes and types of its inputs.

    Raises:
        ValueError: they contradict the operator's definition, or an attribute is missing or unknown.
    """
    order = [attribute.name for attribute in operator.attributes]
    if sorted(order) != sorted(attributes):
        raise ValueError(f"{operator.name} needs exactly the attributes {order}, got {sorted(attributes)}")
    dims = {**operator.bind(shapes), **attributes}
    outputs = operator.output_types(types, attributes)
    ports = (*operator.inputs, *operator.outputs)
    return Binding(
        dims={**dims, **{symbol: rule(dims) for symbol, rule in operator.derive.items()}},
        types={port.name: dtype for port, dtype in zip(ports, (*types, *outputs), strict=True)},
        output_shapes=tuple(operator.output_shapes(dims)),
    )
