"""One operator's outputs on both sides: what is compared depends on what the output means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import onnx_ir as ir

from angelforge.runtime.batch import Batch
from angelforge.runtime.validate.metrics import Array, Difference, Worst, by_row, difference
from angelforge.runtime.validate.operations import JudgeGraph, Operation
from angelforge.runtime.validate.reference import route
from angelforge.runtime.validate.thresholds import BY_ROW, Thresholds

Values = Mapping[str, Array]


@dataclass(frozen=True)
class Finding:
    """A tensor that was compared."""

    place: str
    operator: str
    tensor: str
    step: int
    result: Difference
    limit: float | None
    ok: bool
    note: str = ""
    inputs: tuple[tuple[str, tuple[int, ...]], ...] = ()  # names and shapes of what the operator was given

    @property
    def error(self) -> float:
        """The relative error; of choices the share of tokens that differ."""
        return self.result.relative_error


@dataclass(frozen=True, eq=False)
class Scene:
    """What comparing an operator needs to know beside its outputs."""

    judge: JudgeGraph
    batch: Batch
    limits: Thresholds
    step: int
    whole_layer: bool = False  # the operator was computed from its layer's inputs, not from its own


def not_comparable(operation: Operation, step: int, reason: str) -> Finding:
    """The failure of an operator that the engine under test does not have as the bundle does."""
    result = Difference((), np.inf, np.inf, 0.0, 1.0, ())
    return Finding(operation.place, operation.name, operation.outputs[0], step, result, 0.0, False, reason)


def compare_operation(operation: Operation, found: Values, expected: Values, scene: Scene) -> list[Finding]:
    """Compares those outputs of an operator that `found` has; `expected` has its inputs, too."""
    if operation.kind == "MoERoute":
        pairs = _routing(operation, found, expected, scene)
    elif operation.kind == "PagedAttention":
        pairs = _attention(operation, found, expected, scene)
    else:
        pairs = _tensors(operation, found, expected, scene)
    inputs = tuple((name, tuple(expected[name].shape)) for name in operation.inputs if name in expected)
    return [
        Finding(operation.place, operation.name, tensor, scene.step, result, limit, ok, note, inputs)
        for tensor, result, limit, ok, note in pairs
    ]


_Entry = tuple[str, Difference, float | None, bool, str]


def _tensors(operation: Operation, found: Values, expected: Values, scene: Scene) -> list[_Entry]:
    entries, names = [], list(operation.outputs)
    while names:
        name = names.pop(0)
        if scene.judge.types[name] == ir.DataType.FLOAT8E4M3FN:
            scale = names.pop(0)  # an e4m3 output's scales follow it
            if name in found and scale in found:
                entries.append(_quantized(name, scale, found, expected, scene))
        elif name in found:
            had, wanted = (_counted(name, side[name], scene) for side in (found, expected))
            rows = _rows(name, scene) and not scene.whole_layer
            entries.append(_judged(name, had, wanted, _limit(operation, scene), rows))
    return entries


def _judged(name: str, had: Array, wanted: Array, limit: float | None, rows: bool) -> _Entry:
    """By the tensor's largest value, and with `rows` each token by its own: another may be a thousand times larger."""
    result = difference(had, wanted)
    ok, note = limit is None or result.relative_error <= limit, ""
    if ok and rows and limit is not None and len(errors := by_row(had, wanted)):
        token = int(errors.argmax())
        if errors[token] > limit * BY_ROW:
            inside = difference(had[token], wanted[token]).worst
            worst = tuple(replace(element, index=(token, *element.index)) for element in inside)
            note = f"{errors[token]:.2e} of the largest value of token {token}, limit {limit * BY_ROW:.1e}"
            return name, replace(result, worst=worst), limit, False, note
    return name, result, limit, ok, note


def _limit(operation: Operation, scene: Scene) -> float | None:
    if scene.whole_layer:
        return scene.limits.layer
    return scene.limits.router if operation.kind == "MoELogits" else scene.limits.operator


def _counted(name: str, array: Array, scene: Scene) -> Array:
    """Rows of real tokens; of a pool every page but the spare page 0."""
    if name.startswith("kv_cache"):
        return array[1:]
    return array[: int(scene.batch.num_tokens[0])] if _symbol(name, scene) == "T" else array


def _rows(name: str, scene: Scene) -> bool:
    """Whether its first axis is one of tokens."""
    return _symbol(name, scene) in ("T", "R")


def _symbol(name: str, scene: Scene) -> str | None:
    shape = scene.judge.shapes.get(name)
    first = shape[0] if shape is not None and len(shape) else None
    return first.value if isinstance(first, ir.SymbolicDim) else None


def _quantized(name: str, scale: str, found: Values, expected: Values, scene: Scene) -> _Entry:
    had, wanted = (
        _spread(_counted(name, side[name], scene), _counted(scale, side[scale], scene)) for side in (found, expected)
    )
    result = difference(had, wanted)
    exact = (np.abs(had - wanted) <= scene.limits.operator * np.abs(wanted)) if had.shape == wanted.shape else False
    share = 1.0 - float(np.mean(exact)) if np.size(exact) else 0.0
    judged = not scene.whole_layer
    limit = scene.limits.quantized_step if judged else None
    ok = not judged or (result.relative_error <= scene.limits.quantized_step and share <= scene.limits.quantized_share)
    return name, result, limit, ok, f"{share:.2%} of the e4m3 values differ"


def _spread(codes: Array, scales: Array) -> Array:
    """e4m3 [..., K] times scales [..., ⌈K/128⌉], f64."""
    values = np.asarray(codes).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    return np.asarray(values * np.repeat(scales.astype(np.float64), 128, axis=-1)[..., : values.shape[-1]])


def _attention(operation: Operation, found: Values, expected: Values, scene: Scene) -> list[_Entry]:
    direct = operation.outputs[0]
    if direct not in found:
        return []
    had, wanted = (attended(operation, side, scene.batch) for side in (found, expected))
    return [_judged(direct, had, wanted, _limit(operation, scene), not scene.whole_layer)]


def attended(operation: Operation, values: Values, batch: Batch) -> Array:
    """f64 [tokens, Hq, D] of PagedAttention's outputs, sequences that were left in parts joined."""
    direct, partial, lse, first = (values.get(name) for name in operation.outputs)
    assert direct is not None
    with np.errstate(invalid="ignore"):  # rows that are left in parts are unspecified
        result = direct[: int(batch.num_tokens[0])].astype(np.float64)
    if first is None or partial is None or lse is None:
        return result
    split = int(operation.attributes["split_length"])
    for sequence, start in enumerate(first.tolist()):
        begin, end = batch.query_start[sequence : sequence + 2].tolist()
        if start < 0 or begin == end:
            continue
        tokens, parts = end - begin, -(-int(batch.kv_length[sequence]) // split)
        rows = slice(start, start + tokens * parts)
        logs = lse[rows].astype(np.float64).reshape(tokens, parts, -1)
        weights = np.exp(logs - logs.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        shared = partial[rows].astype(np.float64).reshape(tokens, parts, *direct.shape[1:])
        result[begin:end] = np.where(weights[..., None] > 0, weights[..., None] * shared, 0.0).sum(axis=1)
    return result


def _routing(operation: Operation, found: Values, expected: Values, scene: Scene) -> list[_Entry]:
    ids, weights, bits = operation.outputs
    if ids not in found:
        return []
    margins = router_margins(operation, expected)
    had, wanted = np.sort(found[ids], axis=-1), np.sort(expected[ids], axis=-1)
    differs = (had != wanted).any(axis=-1)
    rows = np.arange(len(differs))
    real = rows < int(scene.batch.num_tokens[0])
    tied = differs & real & (margins <= scene.limits.tie)
    wrong = differs & ~tied
    worst = tuple(
        Worst((int(r), int(c)), float(wanted[r, c]), float(had[r, c]))
        for r in np.flatnonzero(wrong)[:3]
        for c in np.flatnonzero(had[r] != wanted[r])[:1]
    )
    share = float(wrong.sum() / max(len(wrong), 1))
    padding = int((wrong & ~real).sum())
    note = f"{int(wrong.sum())} of {len(wrong)} tokens have other experts"
    note += f" ({padding} padding rows are routed)" if padding else ""
    note += f"; {int(tied.sum())} ties" if tied.any() else ""
    judged = not scene.whole_layer or scene.limits.layer is not None
    result = Difference(tuple(wanted.shape), float(wrong.any()), share, 1.0, share, worst)
    entries: list[_Entry] = [(ids, result, 0.0 if judged else None, not judged or not wrong.any(), note)]
    if weights in found:
        kept = ~differs
        ours, theirs = (_by_expert(side[ids][kept], side[weights][kept]) for side in (found, expected))
        weighed = difference(ours, theirs)
        limit = _limit(operation, scene) if scene.whole_layer else scene.limits.router
        entries.append((weights, weighed, limit, limit is None or weighed.relative_error <= limit, ""))
    if bits in found and not differs.any():
        entries.append((bits, (same := difference(found[bits], expected[bits])), 0.0, same.max_error == 0, ""))
    return entries


def _by_expert(ids: Array, weights: Array) -> Array:
    return np.asarray(np.take_along_axis(weights, np.argsort(ids, axis=-1, kind="stable"), axis=-1))


def router_margins(operation: Operation, values: Values) -> Array:
    """[T]: by how much the closest decision of the router was taken; 0 is a tie."""
    attributes = operation.attributes
    bias = values.get(operation.all_inputs[1], np.float64(0))
    return route(
        values[operation.all_inputs[0]].astype(np.float64),
        np.asarray(bias, np.float64),
        groups=attributes["n_group"],
        kept_groups=attributes["topk_group"],
        top_k=attributes["top_k"],
        scaling=attributes["routed_scaling_factor"],
    ).margins


def first_failure(findings: Sequence[Finding]) -> Finding | None:
    """The first tensor that is beyond its limit, in the order of the graph."""
    return next((finding for finding in findings if not finding.ok), None)
