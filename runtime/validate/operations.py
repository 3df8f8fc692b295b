"""The bundle's graph as its judge runs it: operators by layer, their values under the bundle's names, in f32.

bf16 is widened to f32, because ONNX Runtime has no bf16 arithmetic on CPUs. For an engine that stores bf16 between its
operators the judge rounds what every operator hands on in the same way: then both sides start from the same inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import onnx_ir as ir

from angelforge.bundle import Bundle
from angelforge.engines.network import check_operators
from angelforge.engines.widen import widen_activations
from angelforge.runtime.batch import INPUTS
from angelforge.runtime.validate.rounding import round_as_stored


@dataclass(frozen=True, eq=False)
class Operation:
    """One node of the bundle's graph."""

    place: str  # "layer 3", "word_embeddings", "norm", …
    kind: str  # the operator
    inputs: tuple[str, ...]  # values that are no weights: activations and the call's bookkeeping
    weights: tuple[str, ...]
    outputs: tuple[str, ...]
    all_inputs: tuple[str, ...]  # in the operator's order
    attributes: dict[str, Any]

    @property
    def name(self) -> str:
        """How reports call it."""
        parts = [w for w in self.weights if w.endswith("weight") and "norm" not in w]
        weight = parts[0].removesuffix(".weight").split(".")[-1] if parts else ""
        return f"{self.kind} ({weight})" if weight and self.kind in ("Linear", "Fp8Linear") else self.kind


@dataclass(frozen=True, eq=False)
class Stage:
    """What is run at once when layers are run one by one: a layer, or what stands before or behind all layers."""

    place: str
    operations: tuple[Operation, ...]
    inputs: tuple[str, ...]  # values of earlier stages and of the call
    outputs: tuple[str, ...]  # values that later stages take, or that the graph gives
    pool: str | None  # the pool that it takes; what it gives is `pool_out`
    pool_out: str | None

    @property
    def layer(self) -> int | None:
        """The layer's number."""
        return int(self.place.removeprefix("layer ")) if self.place.startswith("layer ") else None


@dataclass(frozen=True, eq=False)
class JudgeGraph:
    """The widened graph with its operators by stage."""

    model: ir.Model
    stages: tuple[Stage, ...]
    types: dict[str, ir.DataType]  # of every value as the bundle has it
    shapes: dict[str, ir.Shape | None]
    as_stored: bool

    @property
    def operations(self) -> list[Operation]:
        """All operators in their order."""
        return [operation for stage in self.stages for operation in stage.operations]


def judge_graph(bundle: Bundle, as_stored: bool = False, role: str = "target") -> JudgeGraph:
    """The judge of a bundle; with `as_stored`, values that the bundle stores in bf16 are rounded to it.

    Raises:
        AngelForgeError: the graph does not fit this version's operators.
    """
    model = ir.load(bundle.folder / bundle.manifest.graphs[role])
    return prepare_judge(model, as_stored)


def prepare_judge(model: ir.Model, as_stored: bool = False) -> JudgeGraph:
    """The same for a model at hand, which is changed; raises AngelForgeError where its operators do not fit."""
    check_operators(model)
    values = [v for node in model.graph for v in (*node.inputs, *node.outputs) if v is not None]
    types = {str(v.name): v.dtype for v in values if v.dtype is not None}
    shapes = {str(v.name): v.shape for v in values}
    stages = tuple(_stages(model))
    widen_activations(model)
    if as_stored:
        round_as_stored(model, types)
    return JudgeGraph(model, stages, types, shapes, as_stored)


def place_of(name: str) -> str:
    """`layer 3` for a node of model.layers.3, else the module's name."""
    parts = name.split("/")
    layer = next((part for part in parts if part.startswith("layers.")), None)
    if layer is not None:
        return f"layer {layer.removeprefix('layers.')}"
    return "head" if len(parts) == 1 or parts[-2] in ("norm", "model", "lm_head") else parts[-2]


def _stages(model: ir.Model) -> Iterable[Stage]:
    weights = set(model.graph.initializers)
    operations = [_operation(node, weights) for node in model.graph]
    wanted = [{str(v.name) for v in model.graph.outputs}]
    for operation in reversed(operations):
        wanted.append(wanted[-1] | set(operation.inputs))
    after = list(reversed(wanted))[1:]  # what is taken behind each operation
    begin = 0
    for place, group in groupby(operations, key=lambda operation: operation.place):
        members = tuple(group)
        begin += len(members)
        made = [name for operation in members for name in operation.outputs]
        inputs = dict.fromkeys(n for operation in members for n in operation.inputs if n not in made)
        outputs = tuple(name for name in made if name in after[begin - 1])
        pools = [n for n in inputs if n.startswith("kv_cache.")]
        written = [n for n in made if n.startswith("kv_cache_out.")]
        yield Stage(
            place, members, tuple(inputs), outputs, *(names[0] if names else None for names in (pools, written))
        )


def _operation(node: ir.Node, weights: set[str]) -> Operation:
    names = tuple(str(value.name) for value in node.inputs if value is not None)
    return Operation(
        place=place_of(node.name or ""),
        kind=node.op_type,
        inputs=tuple(dict.fromkeys(name for name in names if name not in weights)),
        weights=tuple(name for name in names if name in weights),
        outputs=tuple(str(value.name) for value in node.outputs),
        all_inputs=names,
        attributes={name: attribute.value for name, attribute in node.attributes.items()},
    )


def bookkeeping(names: Sequence[str]) -> list[str]:
    """Those of `names` that are inputs of the call and stand in every batch."""
    return [name for name in names if name in INPUTS]
