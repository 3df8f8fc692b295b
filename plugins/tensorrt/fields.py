"""Attributes of operators as plugin fields: every one, in registered order."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from angelforge.plugins.operator import Operator

_ELEMENTS: dict[type, Any] = {int: np.int64, float: np.float32}  # as ONNX stores them
_TYPES = {int: "INT64", float: "FLOAT32"}


def declared_fields(api: Any, operator: Operator) -> Any:
    """The PluginFieldCollection with which a creator says what it takes."""
    return _collect(api, operator, {a.name: np.empty(0, _ELEMENTS[a.kind]) for a in operator.attributes})


def to_fields(api: Any, operator: Operator, attributes: Mapping[str, int | float]) -> Any:
    """The PluginFieldCollection that holds `attributes`."""
    return _collect(
        api, operator, {a.name: np.array([attributes[a.name]], _ELEMENTS[a.kind]) for a in operator.attributes}
    )


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


def _collect(api: Any, operator: Operator, values: Mapping[str, Any]) -> Any:
    kinds = {a.name: getattr(api.PluginFieldType, _TYPES[a.kind]) for a in operator.attributes}
    return api.PluginFieldCollection([api.PluginField(name, values[name], kinds[name]) for name in kinds])
