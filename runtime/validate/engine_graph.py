"""The graph of a built CPU engine, cut at the borders of the bundle's operators.

ONNX Runtime's optimiser inlines the operators' bodies and drops casts that change nothing, and with them the names of
the values they gave. What it inlines it names after the operator, so the value behind a dropped cast is found again;
where it is not, neighbouring operators are compared as one. An operator that takes other values than the bundle's does
is run on those, and one that takes values of another layer cannot be run: that is a finding, too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
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
    piece: Piece | None  # None where it cannot be cut out; `fault` says why
    fault: str = ""


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
            if not self._ends(pending):  # the border behind it cannot be seen
                continue
            yield self._unit(operations, position + 1 - len(pending), position + 1)
            pending = []

    def _ends(self, operations: Sequence[Operation]) -> bool:
        return operations[-1].outputs[0] in self._alias and not all(is_identity(o) for o in operations)

    def _unit(self, operations: Sequence[Operation], begin: int, end: int) -> Unit:
        """The piece for operations[begin:end], of the values before them whatever it takes."""
        members = tuple(operations[begin:end])
        try:
            return self._cut(members, _taken(members))
        except ValueError:
            pass
        hidden = {name for name in _taken(members) if self._alias.get(name, name) not in self._names}
        first = next((i for i in range(begin) if hidden & set(operations[i].outputs)), begin)
        members = tuple(operations[first:end])  # with the operators whose results cannot be seen
        earlier = [name for operation in operations[:first] for name in operation.outputs]
        own = {name for operation in members for name in operation.outputs}
        try:
            return self._cut(members, [n for n in (*_taken(operations), *earlier) if n not in own])
        except ValueError:
            return Unit(members, (), None, self._missing(members))

    def _cut(self, operations: tuple[Operation, ...], inputs: Iterable[str]) -> Unit:
        """Raises ValueError where the engine's piece needs more than `inputs`."""
        outputs = [n for operation in operations for n in operation.outputs if n in self._alias]
        known = self._known(inputs)
        # An identity's output may be its input: a piece without nodes says nothing.
        outputs = [n for n in outputs if self._alias[n] not in known.values()]
        if not outputs:
            raise ValueError("nothing is computed")
        types = {a: self._widened(n) for n, a in known.items() if n in self._judge.types}
        aliases = dict.fromkeys(self._alias[n] for n in outputs)
        piece = cut(self._model, list(dict.fromkeys(known.values())), list(aliases), types)
        for value in piece.graph.outputs:  # ONNX Runtime wants to be told
            name = next(n for n in outputs if self._alias[n] == value.name)
            value.dtype = self._widened(name)
        session = OrtPiece(piece, self._root, self._threads)
        return Unit(operations, tuple(outputs), _Renamed(session, known, {n: self._alias[n] for n in outputs}))

    def _known(self, names: Iterable[str]) -> dict[str, str]:
        known = {n: self._alias.get(n, n) for n in (*names, *_all_bookkeeping(self._judge))}
        return {n: a for n, a in known.items() if a in self._names}

    def _missing(self, operations: tuple[Operation, ...]) -> str:
        """What the engine's piece takes beside the operators' inputs, in words."""
        known = set(self._known(_taken(operations)).values())
        own = {self._alias[n] for operation in operations for n in operation.outputs if n in self._alias}
        told = {alias: name for name, alias in self._alias.items()}
        nodes = {str(v.name): node for node in self._model.graph for v in node.outputs}
        needed: list[str] = []
        queue, seen = list(own - known), set(known)
        while queue:
            name = queue.pop(0)
            if name in seen:
                continue
            seen.add(name)
            if name in self._model.graph.initializers:
                continue
            if name not in own and (name in told or name not in nodes):
                needed.append(told.get(name, name))
                continue
            queue += [str(v.name) for v in nodes[name].inputs if v is not None] if name in nodes else []
        if not needed:
            return "the engine's graph does not show what computes it"
        names = ", ".join(f"`{name}`" for name in needed[:3])
        return f"the engine's piece needs {names}, which the bundle's operator does not take"

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


def is_identity(operation: Operation) -> bool:
    """Whether it hands on its input, as AllReduce of one rank does: there is nothing to compare."""
    if operation.kind not in OPERATORS:
        return False
    return _source(operation.kind, 0) in {port.name for port in OPERATORS[operation.kind].inputs}


def _taken(operations: Sequence[Operation]) -> list[str]:
    made = {name for operation in operations for name in operation.outputs}
    return list(dict.fromkeys(n for operation in operations for n in operation.inputs if n not in made))


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
