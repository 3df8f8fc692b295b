"""Drives NVIDIA's own plugin classes of the real TensorRT 11 bindings on a machine without TensorRT and GPU.

Run as a program: `python -m support.nvidia_plugins PRECISION TOKENS…`, with LD_LIBRARY_PATH naming the folder of the
empty libraries that `support/empty_tensorrt.py` makes. Prints JSON: for each operator what TensorRT would get, and
which kernels it is seen not to fetch: where it fetches all, and where only those of the last profile.

The compiled half of the bindings gives sizes only TensorRT can make; here they are replaced by plain Python ones that
evaluate, before `tensorrt.plugin` is imported.
"""

import json
import sys
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import tensorrt_bindings as trt


class Expr:
    """An IDimensionExpr: a function of T, or a constant."""

    def __init__(self, evaluate: Any, constant: bool) -> None:
        self.evaluate, self.constant = evaluate, constant

    def is_constant(self) -> bool:
        return self.constant

    def get_constant_value(self) -> int:
        assert self.constant
        return int(self.evaluate(None))

    def is_size_tensor(self) -> bool:
        return False


class Builder:
    """An IExprBuilder."""

    def constant(self, value: int) -> Expr:
        return Expr(lambda sizes: value, True)

    def operation(self, operation: Any, left: Expr, right: Expr) -> Expr:
        apply = {
            trt.DimensionOperation.SUM: lambda a, b: a + b,
            trt.DimensionOperation.PROD: lambda a, b: a * b,
            trt.DimensionOperation.SUB: lambda a, b: a - b,
            trt.DimensionOperation.FLOOR_DIV: lambda a, b: a // b,
            trt.DimensionOperation.CEIL_DIV: lambda a, b: -(-a // b),
            trt.DimensionOperation.MAX: max,
            trt.DimensionOperation.MIN: min,
        }[operation]
        return Expr(lambda sizes: apply(left.evaluate(sizes), right.evaluate(sizes)), left.constant and right.constant)


class Registry:
    """An IPluginRegistry."""

    def __init__(self) -> None:
        self.creators: dict[tuple[str, str, str], Any] = {}

    def register_creator(self, creator: Any, namespace: str = "") -> bool:
        self.creators[creator.name, creator.plugin_version, namespace] = creator
        return True

    def get_creator(self, name: str, version: str, namespace: str = "") -> Any:
        return self.creators.get((name, version, namespace))


class SymExpr:
    """An ISymExpr."""


class Plain:
    """Any structure that TensorRT fills or reads."""


REGISTRY = Registry()


def load_plugin_module() -> Any:
    """`tensorrt.plugin` over the replaced classes."""
    trt.IDimensionExpr = Expr
    trt.DimsExprs = lambda length: [None] * length
    trt.ISymExpr = SymExpr
    trt.get_plugin_registry = lambda: REGISTRY
    sys.modules["tensorrt"] = trt
    import tensorrt_bindings.plugin as plugin

    sys.modules["tensorrt.plugin"] = plugin
    return plugin


def fields_of(operator: Any, attributes: dict[str, Any]) -> list[Any]:
    """Fields in reversed order, as a parser might give them; with the arrays that they point to."""
    fields = []
    for attribute in reversed(operator.attributes):
        field = Plain()
        field.name = attribute.name  # type: ignore[attr-defined]
        field.data = np.array([attributes[attribute.name]])  # type: ignore[attr-defined]
        fields.append(field)
    return fields


def tensor(dims: list[Any], most: list[int], dtype: Any) -> Any:
    """A DynamicPluginTensorDesc; `dims` are integers where they are known, `most` the greatest of the profile."""
    desc = trt.DynamicPluginTensorDesc()
    inner = trt.PluginTensorDesc()
    inner.dims = [size if isinstance(size, int) else -1 for size in dims]
    inner.type, inner.format = dtype, trt.TensorFormat.LINEAR
    desc.desc = inner
    desc.min = [size if isinstance(size, int) else 1 for size in dims]
    desc.opt, desc.max = desc.min, most  # only the greatest sizes may decide
    return desc


@dataclass(frozen=True)
class Node:
    """A node of the graph: its operator, inputs as (known or unknown sizes, sizes at given T), types, attributes."""

    operator: Any
    dims: list[list[int | str]]
    at: Any  # most tokens, T -> shapes of the inputs
    types: list[Any]
    attributes: dict[str, Any]


def drive(node: Node, most_tokens: int, fetch: bool = True) -> Any:
    """One node through NVIDIA's classes in a profile: what TensorRT would learn of it, up to its launch or its code."""
    operator, types = node.operator, node.types
    creator = REGISTRY.get_creator(operator.name, "1", "angelforge")
    plugin = creator.create_plugin(
        operator.name,
        "angelforge",
        fields_of(operator, node.attributes),
        trt.TensorRTPhase.BUILD,
        trt.QuickPluginCreationRequest.STRICT_AOT,
    )
    builder = Builder()

    def expression(size: int | str, port: int, axis: int) -> Expr:
        return (
            builder.constant(size) if isinstance(size, int) else Expr(lambda tokens: node.at(tokens)[port][axis], False)
        )

    output_types = plugin.get_output_data_types(types, [len(shape) for shape in node.dims])
    exprs = [[expression(size, i, j) for j, size in enumerate(shape)] for i, shape in enumerate(node.dims)]
    outputs = plugin.get_output_shapes(exprs, [], builder)
    plugin = plugin.clone()
    inputs = [tensor(dims, most, t) for dims, most, t in zip(node.dims, node.at(most_tokens), types, strict=True)]
    results = [
        tensor(["?" if not size.constant else size.evaluate(0) for size in shape], values(shape, most_tokens), dtype)
        for shape, dtype in zip(outputs, output_types, strict=True)
    ]
    formats = plugin.get_supported_format_combinations([*inputs, *results], len(inputs))
    plugin.configure_plugin(inputs, results)
    plugin.set_tactic(0)
    launch, extras = Plain(), _Extras()
    plugin.get_launch_params([], [*inputs, *results], len(inputs), launch, extras, builder)
    if not fetch:
        return None
    name, ptx = plugin.get_kernel([d.desc for d in inputs], [d.desc for d in results])
    plugin.get_launch_params([], [*inputs, *results], len(inputs), Plain(), _Extras(), builder)  # as another node's
    _, again = plugin.get_kernel([d.desc for d in inputs], [d.desc for d in results])
    steps = [1, min(7, most_tokens), most_tokens]
    return {
        "operator": operator.name,
        "most_tokens": most_tokens,
        "output_types": [dtype.name for dtype in output_types],
        "aliased": [plugin.get_aliased_input(i) for i in range(len(outputs))],
        "formats": [[d.type.name, d.format.name] for d in formats],
        "extra_types": [extra.dtype.name for extra in extras.values],
        "steps": [
            {
                "inputs": node.at(tokens),
                "outputs": [values(shape, tokens) for shape in outputs],
                "launch": {field: getattr(launch, field).expr.evaluate(tokens) for field in vars(launch)},
                "extras": [extra.expr.evaluate(tokens) for extra in extras.values],
            }
            for tokens in steps
        ],
        "entry": name,
        "ptx": ptx.decode(),
        "kept": again is ptx,
        "types": [dtype.name for dtype in types],
        "attributes": node.attributes,
    }


def values(shape: list[Expr], tokens: int) -> list[int]:
    """Sizes of a shape in a step of so many tokens."""
    return [size.evaluate(tokens) for size in shape]


class _Extras:
    """The ISymExprs that take integer arguments."""

    def __init__(self) -> None:
        self.values: list[Any] = []

    @property
    def nbSymExprs(self) -> int:  # noqa: N802 - TensorRT's name
        return len(self.values)

    @nbSymExprs.setter
    def nbSymExprs(self, count: int) -> None:  # noqa: N802
        self.values = [None] * count

    def __setitem__(self, index: int, value: Any) -> None:
        self.values[index] = value


def nodes_of(precision: str) -> list[Node]:
    """Every operator of the full model's layers and of its draft, once. What has no kernel is left out."""
    from angelforge.config import ModelConfig
    from angelforge.draft_config import DraftConfig
    from angelforge.engines.shapes import concrete_shapes
    from angelforge.exporter.graph import build_draft_graph, build_graph
    from angelforge.exporter.synthetic_config import FULL_CONFIG
    from angelforge.exporter.synthetic_draft import FULL_DRAFT_CONFIG
    from angelforge.plugins.operator import DOMAIN
    from angelforge.plugins.registry import OPERATORS
    from angelforge.plugins.tensorrt.kernels import kernel_digest
    from angelforge.plugins.tensorrt.types import to_tensorrt
    from angelforge.precision import Precision

    config = ModelConfig.from_dict(FULL_CONFIG).with_layers(4)
    captured = {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 3], "use_aux_hidden_state": True}}
    draft = DraftConfig.from_dict(FULL_DRAFT_CONFIG | captured, config)
    models = (
        build_graph(config, Precision(precision), 64, 32768),
        build_draft_graph(draft, config, Precision(precision), 64, 32768),
    )

    @cache
    def shapes(index: int, tokens: int) -> Any:
        batch = min(tokens, 32)
        sizes = {"T": tokens, "B": batch, "B+1": batch + 1, "P": 512, "pages": 4000, "R": min(tokens, 128)}
        return concrete_shapes(models[index], sizes)

    found: dict[str, Node] = {}
    for i, node in ((i, node) for i, model in enumerate(models) for node in model.graph):
        if node.domain != DOMAIN or node.op_type in ("AllReduce", *found):
            continue
        operator, inputs = OPERATORS[node.op_type], [value for value in node.inputs if value is not None]
        if kernel_digest(operator) != "none":
            found[operator.name] = Node(
                operator,
                [[size if isinstance(size, int) else "?" for size in value.shape or ()] for value in inputs],
                lambda tokens, i=i, inputs=inputs: [list(shapes(i, tokens)[value]) for value in inputs],
                [to_tensorrt(trt, value.dtype) for value in inputs if value.dtype],
                {str(name): attribute.value for name, attribute in node.attributes.items()},
            )
    return list(found.values())


def main(precision: str, most_tokens: list[int]) -> None:
    """Drives every operator of a precision in every profile."""
    assert load_plugin_module().aot_impl
    from angelforge.plugins.kernel import Gpu
    from angelforge.plugins.tensorrt.aot import register_ahead_of_time
    from angelforge.plugins.tensorrt.fetched import kernels_of
    from angelforge.plugins.tensorrt.library import Library

    nodes = nodes_of(precision)
    library = Library("tensorrt", trt, trt.__version__)
    register_ahead_of_time(library, [node.operator for node in nodes], Gpu("sm_90", 78))
    rows, kernels = [drive(node, tokens) for tokens in most_tokens for node in nodes], kernels_of(library)
    found = {"rows": rows, "unfetched": kernels.missing()}
    kernels.forget()
    for tokens in most_tokens:
        for node in nodes:
            drive(node, tokens, fetch=tokens == most_tokens[-1])
    print(json.dumps(found | {"unfetched of one profile for all": kernels.missing()}))


if __name__ == "__main__":
    main(sys.argv[1], [int(tokens) for tokens in sys.argv[2:]])
