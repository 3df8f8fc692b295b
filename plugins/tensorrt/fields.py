"""Attributes of operators as plugin fields: every one, in registered order.

A field collection points to its arrays without keeping them: whoever hands one to TensorRT holds the arrays as long.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from angelforge.plugins.operator import Operator

_ELEMENTS: dict[type, Any] = {int: np.int64, float: np.float32}  # as ONNX stores them
_TYPES = {int: "INT64", float: "FLOAT32"}

Arrays = Mapping[str, Any]  # values of the attributes by name, as one-element arrays


def empty_arrays(operator: Operator) -> Arrays:
    """For the fields with which a creator says what it takes."""
    return {a.name: np.empty(0, _ELEMENTS[a.kind]) for a in operator.attributes}


def to_arrays(operator: Operator, attributes: Mapping[str, int | float]) -> Arrays:
    """For the fields that hold `attributes`."""
    return {a.name: np.array([attributes[a.name]], _ELEMENTS[a.kind]) for a in operator.attributes}


def to_fields(api: Any, operator: Operator, arrays: Arrays) -> Any:
    """A PluginFieldCollection that points to `arrays`, in registered order."""
    kinds = {a.name: getattr(api.PluginFieldType, _TYPES[a.kind]) for a in operator.attributes}
    return api.PluginFieldCollection([api.PluginField(name, arrays[name], kind) for name, kind in kinds.items()])


def from_fields(operator: Operator, fields: Any) -> dict[str, int | float]:
    """Attributes by name, in registered order whatever the order of `fields`.

    Raises:
        ValueError: an attribute is missing: TensorRT would otherwise run the plugin with a zero.
    """
    found = {field.name: field for field in fields}
    missing = [a.name for a in operator.attributes if a.name not in found or not found[a.name].size]
    if missing:
        raise ValueError(f"{operator.name} lacks the attribute {', '.join(missing)}; every one must be given")
    return {a.name: a.kind(np.asarray(found[a.name].data).reshape(-1)[0]) for a in operator.attributes}
