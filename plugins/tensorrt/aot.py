"""Operators as ahead-of-time plugins of TensorRT 11: engines hold their PTX and need no Python to run.

NVIDIA's quickly-deployable plugins (`tensorrt.plugin`) ask for a description function (shapes and types) and an
implementation function (PTX, launch sizes as symbolic expressions, integer arguments). Both are made here from an
operator. The implementation gets the attributes by position, in the order in which fields happened to arrive; so it
takes them from the description, which gets them by name.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from angelforge.errors import AngelForgeError
from angelforge.plugins.kernel import Gpu
from angelforge.plugins.operator import DOMAIN, Operator
from angelforge.plugins.tensorrt.fetched import Kernels, kernels_of
from angelforge.plugins.tensorrt.launches import plan_launch
from angelforge.plugins.tensorrt.library import Library
from angelforge.plugins.tensorrt.ptx import plugin_ptx
from angelforge.plugins.tensorrt.types import from_tensorrt, to_tensorrt

if TYPE_CHECKING:
    from angelforge.plugins.compile import Compiled

_ATTRIBUTES = "angelforge_attributes"  # set on the first output's descriptor


class Symbol:
    """A size as `tensorrt.plugin` knows it, in the arithmetic of shape and launch rules: +, * and //."""

    def __init__(self, expression: Any) -> None:
        self.expression = expression  # ShapeExpr or SymIntExpr

    def __add__(self, other: int | Symbol) -> Symbol:
        return Symbol(self.expression + plain(other))

    def __mul__(self, other: int | Symbol) -> Symbol:
        return Symbol(self.expression * plain(other))

    def __floordiv__(self, other: int | Symbol) -> Symbol:
        return Symbol(self.expression // plain(other))

    __radd__, __rmul__ = __add__, __mul__


def plain(size: Any) -> Any:
    """A size as `tensorrt.plugin` takes it: an integer or its own expression."""
    return size.expression if isinstance(size, Symbol) else size


def register_ahead_of_time(library: Library, operators: Iterable[Operator], gpu: Gpu) -> None:
    """Registers operators as ahead-of-time plugins for `gpu`, in the namespace "angelforge"; once per process.

    Raises:
        AngelForgeError: this TensorRT has no such plugins.
    """
    for operator in operators:
        _register(library, operator.name, gpu, _Unhashed(operator))


@dataclass(frozen=True)
class _Unhashed:
    """Keeps an operator out of a cache's key; its name stands for it."""

    operator: Operator = field(compare=False)


@cache
def _register(library: Library, name: str, gpu: Gpu, held: _Unhashed) -> None:
    plugin, operator, plugin_id = _plugin_module(library), held.operator, f"{DOMAIN}::{name}"
    plugin.register(plugin_id)(describe(library.api, plugin, operator))
    plugin.aot_impl(plugin_id)(implement(library.api, plugin, operator, gpu, kernels_of(library)))


def describe(api: Any, plugin: Any, operator: Operator) -> Callable[..., Any]:
    """The description function: descriptors of the outputs from descriptors of the inputs and attributes by name."""

    def description(*inputs: Any, **attributes: int | float) -> Any:
        shapes = operator.output_shapes({**operator.bind([_sizes(desc) for desc in inputs]), **attributes})
        types = operator.output_types([from_tensorrt(api, desc.dtype) for desc in inputs], attributes)
        sources = {port.name: desc for port, desc in zip(operator.inputs, inputs, strict=True)}
        outputs = [
            sources[operator.aliases[port.name]].aliased()
            if port.name in operator.aliases
            else plugin.from_shape_expr(tuple(plain(size) for size in shape), dtype=to_tensorrt(api, dtype))
            for port, shape, dtype in zip(operator.outputs, shapes, types, strict=True)
        ]
        own = next(
            desc for desc, port in zip(outputs, operator.outputs, strict=True) if port.name not in operator.aliases
        )
        setattr(own, _ATTRIBUTES, dict(attributes))
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    result = plugin.TensorDesc if len(operator.outputs) == 1 else tuple[(plugin.TensorDesc,) * len(operator.outputs)]  # type: ignore[misc]
    _sign(description, _parameters(plugin, operator), result)
    return description


def implement(api: Any, plugin: Any, operator: Operator, gpu: Gpu, kernels: Kernels) -> Callable[..., Any]:
    """The implementation function: entry name, PTX, launch sizes and integer arguments for one profile."""
    count = len(operator.inputs)

    def implementation(*arguments: Any) -> tuple[str, str, Any, Any]:
        inputs, outputs = arguments[:count], arguments[-2]
        tokens = _most_tokens(operator, inputs)
        launch = plan_launch(
            operator,
            [_sizes(desc) for desc in inputs],
            [from_tensorrt(api, desc.dtype) for desc in inputs],
            _attributes_of(operator, outputs),
            tokens,
            gpu,
        )
        sizes = plugin.KernelLaunchParams()
        sizes.grid_x, sizes.grid_y, sizes.grid_z = (plain(size) for size in launch.grid)
        sizes.block_x = launch.compiled.warps * 32
        sizes.shared_mem = launch.compiled.shared
        extras = plugin.SymIntExprs(len(launch.extras))
        for i, extra in enumerate(launch.extras):
            extras[i] = plugin.SymInt32(plain(extra))
        parameters = count + len(launch.extras) + len(operator.outputs)
        ptx = kernels.tell(_kept_ptx(launch.compiled, parameters), f"{operator.name} for up to {tokens} tokens")
        return launch.compiled.entry, ptx, sizes, extras

    last = [_parameter("outputs", tuple[plugin.TensorDesc]), _parameter("tactic", int)]
    result = tuple[str | bytes, str | bytes, plugin.KernelLaunchParams, plugin.SymIntExprs]
    _sign(implementation, [*_parameters(plugin, operator), *last], result)
    return implementation


@cache
def _kept_ptx(compiled: Compiled, parameters: int) -> bytes:
    """`plugin_ptx`, as bytes that stay where they are."""
    return plugin_ptx(compiled, parameters).encode()


def _plugin_module(library: Library) -> Any:
    try:
        module = importlib.import_module("tensorrt.plugin")
    except ImportError as error:
        raise AngelForgeError(
            f"{library.title} has no ahead-of-time plugins (no module tensorrt.plugin: {error}); build with "
            "--plugins python."
        ) from error
    if not hasattr(module, "aot_impl"):
        raise AngelForgeError(f"{library.title} has no ahead-of-time plugins; build with --plugins python.")
    return module


def _parameters(plugin: Any, operator: Operator) -> list[inspect.Parameter]:
    ports = [_parameter(port.name, plugin.TensorDesc) for port in operator.inputs]
    return [*ports, *(_parameter(attribute.name, attribute.kind) for attribute in operator.attributes)]


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=annotation)


def _sign(function: Any, parameters: Sequence[inspect.Parameter], result: Any) -> None:
    """Gives a function the signature that `tensorrt.plugin` reads names, types and order from."""
    function.__signature__ = inspect.Signature(list(parameters), return_annotation=result)


def _sizes(desc: Any) -> list[int | Symbol]:
    """A descriptor's shape: integers where they are known."""
    return [
        Symbol(size) if size.is_fake or not size.is_constant else int(size.constant_value())  #
        for size in desc.shape_expr
    ]


def _attributes_of(operator: Operator, outputs: Sequence[Any]) -> Mapping[str, int | float]:
    found: Mapping[str, int | float] | None = next(
        (getattr(desc, _ATTRIBUTES) for desc in outputs if hasattr(desc, _ATTRIBUTES)), None
    )
    if found is None:
        raise AngelForgeError(
            f"TensorRT asks for the kernel of {operator.name} before its description; please report this."
        )
    return found


def _most_tokens(operator: Operator, inputs: Sequence[Any]) -> int:
    """The greatest T of the profile that is being built."""
    for port, desc in zip(operator.inputs, inputs, strict=True):
        if "T" in port.shape and desc.has_shape:
            axis = port.shape.index("T")
            return int(desc.shape.max[axis] if desc.shape.is_dynamic else desc.shape[axis])
    raise AngelForgeError(f"TensorRT asks for the kernel of {operator.name} without a profile; please report this.")
