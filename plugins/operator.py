"""What an operator of the domain `angelforge` is: ports, attributes, shape rule and function body in one frozen object.

Everything else about an operator (ONNX schema, ONNX function, TensorRT plugin) is derived from this object.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
from onnxscript import OpBuilder, build_function

DOMAIN = "angelforge"
DOMAIN_VERSION = 1
OPSET = 24
IR_VERSION = 11
WEIGHT = "angelforge.weight"  # metadata of the graph inputs that are weights: a rank's slices of them

Dim = int | str | None  # a known size, a symbolic one, or unknown


@dataclass(frozen=True)
class Port:
    """An input or output. Its element type is a type variable or an ONNX type; its shape is symbols or sizes."""

    name: str
    type: str
    shape: tuple[str | int, ...]
    doc: str = ""


@dataclass(frozen=True)
class Attribute:
    """An attribute; every node carries every one, in this order."""

    name: str
    kind: type  # int or float
    doc: str = ""


@dataclass(frozen=True)
class AttributeRef:
    """The value of a function's attribute, to be given to an attribute of a node in its body."""

    name: str
    kind: ir.AttributeType

    def as_(self, target: str) -> ir.Attr:
        """The reference under the name `target` that the node's own attribute has."""
        return ir.RefAttr(target, self.name, self.kind)


@dataclass(frozen=True)
class Operator:
    """One operator: one node, one plugin, one kernel launch.

    `types` maps each type variable to the ONNX types it may take. An output whose type is not fixed by an input names
    the integer attribute that holds it (`type="dtype"`, an `onnx.TensorProto` value). `derive` gives the symbols of
    output shapes that no input binds, from input symbols and attributes; it uses only `+`, `*` and `//`, so that it
    serves integers and TensorRT's dimension expressions alike. `aliases` maps an output's name to the input whose
    memory it shares.
    """

    name: str
    doc: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    body: Callable[..., Any]
    attributes: tuple[Attribute, ...] = ()
    types: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    derive: Mapping[str, Callable[[Mapping[str, Any]], Any]] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    version: int = 1

    def function(self) -> ir.Function:
        """The ONNX function with this operator's body; `body(op, *inputs, **attribute references)` is traced once."""
        references = {a.name: AttributeRef(a.name, _ATTRIBUTE_TYPES[a.kind]) for a in self.attributes}
        function = build_function(
            lambda op, *values: self.body(op, *values, **references),
            [ir.val(port.name) for port in self.inputs],
            domain=DOMAIN,
            name=self.name,
            attributes=[ir.Attr(a.name, _ATTRIBUTE_TYPES[a.kind], None) for a in self.attributes],
            opset_imports={"": OPSET},
        )
        for value, port in zip(function.outputs, self.outputs, strict=True):
            value.name = port.name if port.name not in {p.name for p in self.inputs} else f"{port.name}_out"
        return function

    def infer(self, inputs: Sequence[ir.Value], attributes: Mapping[str, int | float]) -> list[ir.Value]:
        """Typed outputs for these inputs.

        Raises:
            ValueError: an input's rank, size or type contradicts the operator's definition (a programming error).
        """
        bound = self.bind([_dims(value) for value in inputs])
        dims: dict[str, Any] = {**bound, **attributes}
        shapes = self.output_shapes(dims)
        types = self.output_types([value.dtype for value in inputs], attributes)
        return [
            ir.val(None, dtype=dtype, shape=[_as_dim(d) for d in shape])
            for dtype, shape in zip(types, shapes, strict=True)
        ]

    def bind(self, shapes: Sequence[Sequence[Any] | None]) -> dict[str, Any]:
        """Binds the symbols of the input shapes; a symbol seen twice must mean the same size."""
        if len(shapes) != len(self.inputs):
            raise ValueError(f"{self.name} takes {len(self.inputs)} inputs, got {len(shapes)}")
        bound: dict[str, Any] = {}
        for port, shape in zip(self.inputs, shapes, strict=True):
            if shape is None:
                continue
            if len(shape) != len(port.shape):
                raise ValueError(f"{self.name}: input {port.name} has shape {list(shape)}, needed {list(port.shape)}")
            for symbol, size in zip(port.shape, shape, strict=True):
                known = symbol if isinstance(symbol, int) else bound.get(symbol, size)
                if isinstance(known, int) and isinstance(size, int) and known != size:
                    raise ValueError(
                        f"{self.name}: input {port.name} has shape {list(shape)}, needed {list(port.shape)} "
                        f"with {symbol} = {known}"
                    )
                if isinstance(symbol, str) and (symbol not in bound or isinstance(size, int)):
                    bound[symbol] = size
        return bound

    def output_shapes(self, dims: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        """Output shapes from bound symbols and attributes (the operator's shape rule)."""
        symbols = {k: _Symbol(v) if isinstance(v, str) else v for k, v in dims.items()}
        return [
            tuple(
                d if isinstance(d, int) else self.derive[d](symbols) if d in self.derive else dims[d] for d in p.shape
            )
            for p in self.outputs
        ]

    def output_types(
        self, inputs: Sequence[ir.DataType | None], attributes: Mapping[str, int | float]
    ) -> list[ir.DataType]:
        """Element types of the outputs (the operator's type rule); None is an input of unknown type.

        Raises:
            ValueError: an input has a type that the operator does not take, or types that must be equal are not.
        """
        types: dict[str, ir.DataType] = {}
        for port, dtype in zip(self.inputs, inputs, strict=True):
            allowed = self.types.get(port.type, (port.type,))
            if dtype is None:
                continue
            if dtype.name not in allowed or types.setdefault(port.type, dtype) != dtype:
                raise ValueError(f"{self.name}: input {port.name} is {dtype.name}, needed {port.type} of {allowed}")
        return [self._output_type(port, types, attributes) for port in self.outputs]

    def _output_type(
        self, port: Port, types: Mapping[str, ir.DataType], attributes: Mapping[str, int | float]
    ) -> ir.DataType:
        if port.type in attributes:
            return ir.DataType(int(attributes[port.type]))
        return types[port.type] if port.type in types else ir.DataType[port.type]


_ATTRIBUTE_TYPES = {int: ir.AttributeType.INT, float: ir.AttributeType.FLOAT}


class _Symbol:
    """A symbolic size in ONNX shape arithmetic, named by its expression: equal sizes keep equal names."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __mul__(self, other: Any) -> "_Symbol":
        return self if other == 1 else _Symbol(f"{self.name}*{other}")

    def __add__(self, other: Any) -> "_Symbol":
        return self if other == 0 else _Symbol(f"{self.name}+{other}")

    def __floordiv__(self, other: Any) -> "_Symbol":
        return self if other == 1 else _Symbol(f"({self.name})//{other}")

    def __str__(self) -> str:
        return self.name


def _dims(value: ir.Value) -> list[Dim] | None:
    if value.shape is None:
        return None
    return [d if isinstance(d, int) else d.value for d in value.shape]


def _as_dim(size: Any) -> int | str | None:
    return str(size) if isinstance(size, _Symbol) else size


def call(op: OpBuilder, operator: Operator, *inputs: ir.Value, **attributes: int | float) -> Any:
    """Adds one node of `operator` to the graph under construction and returns its typed output(s).

    Raises:
        ValueError: attributes are missing or unknown, or the inputs do not fit (a programming error).
    """
    order = [a.name for a in operator.attributes]
    if sorted(order) != sorted(attributes):
        raise ValueError(f"{operator.name} needs exactly the attributes {order}, got {sorted(attributes)}")
    outputs = op.builder.call_op(
        operator.name,
        inputs,
        {name: attributes[name] for name in order},
        domain=DOMAIN,
        version=DOMAIN_VERSION,
        outputs=[f"{operator.name}.{port.name}" for port in operator.outputs],
    )
    values = [outputs] if len(operator.outputs) == 1 else list(outputs)
    for value, typed in zip(values, operator.infer(inputs, attributes), strict=True):
        value.type, value.shape = typed.type, typed.shape
    return outputs
