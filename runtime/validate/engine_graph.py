"""The graph of a built CPU engine, cut at the borders of the bundle's operators.

ONNX Runtime's optimiser inlines the operators' bodies and drops casts that change nothing, and with them the names of
the values they gave. What it inlines it names after the operator, so the value behind a dropped cast is found again;
where it is not, neighbouring operators are compared as one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

import onnx_ir as ir

from angelforge.plugins.operator import DOMAIN
from angelforge.plugins.registry import OPERATORS
from angelforge.runtime.validate.cutting import Array, OrtPiece, Values, cut
from angelforge.runtime.validate.operations import JudgeGraph, Operation, bookkeeping

_CASTS = ("Cast", "CastLike", "Identity")


class Piece(Protocol):
    """Something that computes values from values."""

    def run(self, values: Values) -> dict[str, Array]:
        """Outputs by the bundle's names for inputs by the bundle's names."""


@dataclass(frozen=True, eq=False)
class Unit:
    """Operators that one piece computes: one, or several where their borders cannot be seen."""

    operations: tuple[Operation, ...]
    outputs: tuple[str, ...]
    piece: Piece


class EngineGraph:
    """The engine under test."""

    as_stored = False  # it widens bf16

    def __init__(self, model: ir.Model, weights_root: Path, judge: JudgeGraph, threads: int = 0) -> None:
        """`model` is the engine's graph; `weights_root` the folder that its weights' locations are relative to."""
        self._model, self._root, self._judge, self._threads = model, weights_root, judge, threads
        self._names = {str(v.name) for node in model.graph for v in node.outputs}
        self._names |= {str(v.name) for v in model.graph.inputs}
        count = Counter(operation.kind for operation in judge.operations)
        # Where a body has vanished altogether, nobody knows which prefix is whose.
        self._prefixes = {k: found for k, found in _instances(self._names).items() if len(found) == count[k]}
        self._alias: dict[str, str] = {}
        seen: dict[str, int] = {}
        for operation in judge.operations:
            index = seen.get(operation.kind, 0)
            seen[operation.kind] = index + 1
            for position, output in enumerate(operation.outputs):
                found = self._find(operation, index, position, output)
                if found is not None:
                    self._alias[output] = found

    def names(self) -> set[str]:
        """The bundle's values that the engine's graph has."""
        return set(self._alias)

    def units(self, operations: Sequence[Operation], whole: bool) -> Iterator[Unit]:
        """Pieces for `operations`, one after another; with `whole` a single one for all of them."""
        pending: list[Operation] = []
        for position, operation in enumerate(operations):
            pending.append(operation)
            if whole and position + 1 < len(operations):
                continue
            unit = self._unit(tuple(pending))
            if unit is not None:
                pending = []
                yield unit

    def _unit(self, operations: tuple[Operation, ...]) -> Unit | None:
        made = {name for operation in operations for name in operation.outputs}
        outputs = [n for operation in operations for n in operation.outputs if n in self._alias]
        inputs = dict.fromkeys(n for operation in operations for n in operation.inputs if n not in made)
        known = {n: self._alias.get(n, n) for n in (*inputs, *_all_bookkeeping(self._judge))}
        known = {n: a for n, a in known.items() if a in self._names}
        # An identity's output may be its input: a piece without nodes says nothing.
        outputs = [n for n in outputs if self._alias[n] not in known.values()]
        if not outputs or operations[-1].outputs[0] not in self._alias:
            return None
        types = {a: self._widened(n) for n, a in known.items() if n in self._judge.types}
        aliases = dict.fromkeys(self._alias[n] for n in outputs)
        try:
            piece = cut(self._model, list(dict.fromkeys(known.values())), list(aliases), types)
        except ValueError:
            return None
        for value in piece.graph.outputs:  # ONNX Runtime wants to be told
            name = next(n for n in outputs if self._alias[n] == value.name)
            value.dtype = self._widened(name)
        session = OrtPiece(piece, self._root, self._threads)
        return Unit(operations, tuple(outputs), _Renamed(session, known, {n: self._alias[n] for n in outputs}))

    def _widened(self, name: str) -> ir.DataType:
        dtype = self._judge.types[name]
        return ir.DataType.FLOAT if dtype == ir.DataType.BFLOAT16 else dtype

    def _find(self, operation: Operation, index: int, position: int, output: str) -> str | None:
        if output in self._names:
            return output
        if operation.kind not in OPERATORS:
            return None
        source = _source(operation.kind, position)
        if source in {port.name for port in OPERATORS[operation.kind].inputs}:  # an identity
            ports = [port.name for port in OPERATORS[operation.kind].inputs]
            name = operation.all_inputs[ports.index(source)]
            return self._alias.get(name, name if name in self._names else None)
        prefixes = self._prefixes.get(operation.kind, [])
        found = f"{prefixes[index]}_{source}" if index < len(prefixes) else ""
        return found if found in self._names else None


@dataclass(frozen=True, eq=False)
class _Renamed:
    session: OrtPiece
    inputs: dict[str, str]  # the bundle's name: the engine's
    outputs: dict[str, str]

    def run(self, values: Values) -> dict[str, Array]:
        found = self.session.run({alias: values[name] for name, alias in self.inputs.items() if name in values})
        return {name: found[alias] for name, alias in self.outputs.items()}


def _all_bookkeeping(judge: JudgeGraph) -> list[str]:
    return bookkeeping([str(value.name) for value in judge.model.graph.inputs])


def _instances(names: set[str]) -> dict[str, list[str]]:
    """The prefixes that ONNX Runtime gave the inlined bodies of each operator, in the order of the graph."""
    found: dict[str, set[tuple[int, str]]] = {}
    for name in names:
        match = re.match(r"(_inlfunc_([A-Za-z0-9]+)(?:_token_(\d+))?)_", name)
        if match and match[2] in OPERATORS:
            found.setdefault(match[2], set()).add((int(match[3] or -1), match[1]))
    return {kind: [prefix for _, prefix in sorted(entries)] for kind, entries in found.items()}


@cache
def _source(kind: str, position: int) -> str:
    """The value in an operator's body that its output is, but for casts."""
    value = OPERATORS[kind].function().outputs[position]
    node = value.producer()
    while node is not None and node.op_type in _CASTS and node.domain != DOMAIN and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return str(value.name)
