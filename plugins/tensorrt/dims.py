"""Sizes of a TensorRT network under construction, in the arithmetic that operators' shape rules use."""

from collections.abc import Iterable
from typing import Any, Union


class Size:
    """A size that is not known before run time. It takes +, * and // with integers and other sizes."""

    def __init__(self, api: Any, builder: Any, expression: Any) -> None:
        """`expression` is an IDimensionExpr, made by the IExprBuilder `builder` of the TensorRT module `api`."""
        self.api, self.builder, self.expression = api, builder, expression

    def __add__(self, other: Union[int, "Size"]) -> "Size":
        return self._combine(self.api.DimensionOperation.SUM, other)

    def __mul__(self, other: Union[int, "Size"]) -> "Size":
        return self._combine(self.api.DimensionOperation.PROD, other)

    def __floordiv__(self, other: Union[int, "Size"]) -> "Size":
        return self._combine(self.api.DimensionOperation.FLOOR_DIV, other)

    __radd__, __rmul__ = __add__, __mul__

    def _combine(self, operation: Any, other: Union[int, "Size"]) -> "Size":
        operand = other.expression if isinstance(other, Size) else self.builder.constant(other)
        return Size(self.api, self.builder, self.builder.operation(operation, self.expression, operand))


def from_expressions(api: Any, builder: Any, expressions: Iterable[Any]) -> list[int | Size]:
    """A shape of IDimensionExpr as integers where they are constant, else as sizes."""
    return [
        e.get_constant_value() if e.is_constant() else Size(api, builder, e)  #
        for e in expressions
    ]


def to_expressions(api: Any, builder: Any, shape: Iterable[int | Size]) -> Any:
    """The DimsExprs of a shape."""
    return api.DimsExprs([size.expression if isinstance(size, Size) else builder.constant(size) for size in shape])
