"""Runs a bundle layer after layer on the judge, and each layer or operator of the engine under test on its values.

Memory is that of one layer: a layer's session is opened, sees all packed calls one after another, and is closed before
the next. Between layers only the residual stream of every call is kept.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import ml_dtypes
import numpy as np
import onnx_ir as ir

from angelforge.bundle import Bundle
from angelforge.runtime.batch import INPUTS
from angelforge.runtime.validate.compare import Finding, Scene, compare_operation, not_comparable
from angelforge.runtime.validate.cutting import Array, OrtPiece, Values, cut
from angelforge.runtime.validate.data import Schedule
from angelforge.runtime.validate.engine_graph import Unit, is_identity
from angelforge.runtime.validate.operations import JudgeGraph, Operation, Stage
from angelforge.runtime.validate.thresholds import Thresholds
from angelforge.tensorfile import read_tensor

Report = Callable[[int, int], None]  # stages done, stages in all


class Candidate(Protocol):
    """An engine under test that can be run in pieces."""

    as_stored: bool  # it stores values in the bundle's types; otherwise in f32

    def units(self, operations: Sequence[Operation], whole: bool) -> Iterator[Unit]:
        """Pieces that compute `operations`: each for itself as far as possible, or with `whole` all at once."""


@dataclass(frozen=True, eq=False)
class StageValues:
    """What the judge computed in one stage of one call: all values by name, weights of the router included."""

    stage: Stage
    step: int
    values: Mapping[str, Array]


def walk(
    judge: JudgeGraph, bundle: Bundle, schedule: Schedule, more: Sequence[Mapping[str, Array]] | None = None
) -> Iterator[StageValues]:
    """The judge's values of every call of a stage, then of the next stage; valid until the next is asked for.

    `more` are inputs of every call beside its batch, as a draft has them. Raises AngelForgeError where ONNX Runtime
    cannot run a layer.
    """
    root = bundle.folder
    carried: list[dict[str, Array]] = [{name: getattr(step.batch, name) for name in INPUTS} for step in schedule.steps]
    for values, given in zip(carried, more or (), strict=False):
        values |= given
    for number, stage in enumerate(judge.stages):
        session = OrtPiece(_stage_model(judge, stage), root)
        pool = None if stage.pool is None else _empty_pool(judge, stage, schedule.num_pages)
        biases = {name: read_tensor(bundle.tensors[name]) for name in _biases(stage)}
        kept = {name for later in judge.stages[number + 1 :] for name in later.inputs}
        for step, values in enumerate(carried):
            given = {**values, **biases} if pool is None else {**values, **biases, str(stage.pool): pool}
            made = session.run(given)
            if stage.pool_out is not None:
                pool = made[stage.pool_out]
            yield StageValues(stage, step, {**given, **made})
            carried[step] = {n: a for n, a in (values | made).items() if n in kept or n in INPUTS}
        del session, given, made, pool, biases  # before the next layer's are opened


def compare_walk(
    judge: JudgeGraph,
    candidate: Candidate,
    bundle: Bundle,
    schedule: Schedule,
    limits: Thresholds,
    *,
    by_layer: bool,
    places: Sequence[str] | None = None,
    more: Sequence[Mapping[str, Array]] | None = None,
    report: Report | None = None,
) -> list[Finding]:
    """Compares all calls by layer or by operator, each given the judge's inputs, in the order of the graph.

    `places` limits the comparison to some stages; `more` is as in `walk`. Raises AngelForgeError where a side cannot
    run.
    """
    findings: list[Finding] = []
    walked = walk(judge, bundle, schedule, more)
    for stage, found in compare_stages(judge, candidate, schedule, limits, walked, by_layer=by_layer, places=places):
        findings += found
        if report is not None:
            report(judge.stages.index(stage) + 1, len(judge.stages))
    return findings


def compare_stages(
    judge: JudgeGraph,
    candidate: Candidate,
    schedule: Schedule,
    limits: Thresholds,
    walked: Iterable[StageValues],
    *,
    by_layer: bool,
    places: Sequence[str] | None = None,
) -> Iterator[tuple[Stage, list[Finding]]]:
    """The findings of one stage after another, of what the judge `walked`."""
    left = None if places is None else Counter(s.place for s in judge.stages if s.place in places)
    for stage, calls in groupby(walked, key=lambda values: values.stage):
        if left is not None and not left.total():
            return  # the judge need not go on
        if left is not None and stage.place not in left:
            deque(calls, maxlen=0)  # the judge goes on
            continue
        units = list(candidate.units(stage.operations, by_layer))
        by_unit: list[list[Finding]] = [[] for _ in units]
        for call in calls:
            scene = Scene(judge, schedule.steps[call.step].batch, limits, call.step, by_layer)
            given = as_given(call.values, judge, candidate.as_stored)
            for unit, findings in zip(units, by_unit, strict=True):
                findings += _compare_unit(unit, stage, given, call.values, scene)
        by_unit.append(_uncovered(stage, units, by_unit))
        if left is not None:
            left[stage.place] -= 1
        del units  # and with them their sessions, before the judge opens the next layer
        yield stage, [finding for findings in by_unit for finding in findings]


def _uncovered(stage: Stage, units: Sequence[Unit], by_unit: Sequence[Sequence[Finding]]) -> list[Finding]:
    """A failure for each operator that nothing was compared of: what is not seen is not sound."""
    compared = [unit for unit, findings in zip(units, by_unit, strict=True) if findings]
    covered = {id(operation) for unit in compared for operation in unit.operations}
    return [
        not_comparable(operation, 0, "the engine's graph does not show what computes it")
        for operation in stage.operations
        if id(operation) not in covered and not is_identity(operation)
    ]


def _compare_unit(unit: Unit, stage: Stage, given: Values, expected: Values, scene: Scene) -> list[Finding]:
    if unit.piece is None:
        return [not_comparable(unit.operations[-1], scene.step, unit.fault)]
    results = unit.piece.run(given)
    findings = []
    for operation in unit.operations:
        names = operation.outputs
        if scene.whole_layer and operation.kind != "MoERoute":  # what happens inside the layer is not shown
            names = tuple(name for name in names if name in stage.outputs)
        kept = {name: results[name] for name in names if name in results}
        findings += compare_operation(operation, kept, expected, scene)
    return findings


def as_given(values: Mapping[str, Array], judge: JudgeGraph, as_stored: bool) -> Mapping[str, Array]:
    """The judge's values in the types that the engine under test takes; rounding is exact where the judge rounds."""
    if not as_stored:
        return values
    return {
        name: array.astype(ml_dtypes.bfloat16) if judge.types.get(name) == ir.DataType.BFLOAT16 else array
        for name, array in values.items()
    }


def _stage_model(judge: JudgeGraph, stage: Stage) -> ir.Model:
    outputs = [name for operation in stage.operations for name in operation.outputs]
    return cut(judge.model, stage.inputs, outputs)


def _empty_pool(judge: JudgeGraph, stage: Stage, num_pages: int) -> Array:
    return np.zeros(pool_shape(judge, str(stage.pool), num_pages), np.float32)


def pool_shape(judge: JudgeGraph, name: str, num_pages: int) -> tuple[int, ...]:
    """The shape of a layer's pool with so many pages; everything but their number is fixed."""
    shape = judge.shapes[name]
    assert shape is not None
    return (num_pages, *(size for size in list(shape)[1:] if isinstance(size, int)))


def _biases(stage: Stage) -> list[str]:
    return [name for operation in stage.operations if operation.kind == "MoERoute" for name in operation.weights]
