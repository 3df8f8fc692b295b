"""What helps when a model does not fit: changes of options, each tried out before it is proposed."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

from angelforge.engines.plan_types import Plan, PlanRequest
from angelforge.precision import Precision
from angelforge.ranks import RANKS, can_split
from angelforge.targets import TARGETS, Target


def find_remedies(request: PlanRequest, found: Plan, fits: Callable[[PlanRequest], bool]) -> tuple[str, ...]:
    """What makes `request` fit, as options of the command line; of every sort the smallest.

    Each is tried out with `fits`. `found` is the plan that does not fit.
    """
    remedies = [f"--max-context {found.tokens // 1024 * 1024}"] if found.tokens >= 1024 else []
    for group in _changes(request):
        fitting = (change for change in group if fits(dataclasses.replace(request, **change)))
        remedies += [_options(change) for change in itertools.islice(fitting, 1)]
    return tuple(remedies)


def _changes(request: PlanRequest) -> list[list[dict[str, Any]]]:
    """What may be tried: more ranks; FP8, alone or with more ranks; each other target."""
    if request.target.backend == "onnxruntime":
        return []
    ranks = [n for n in RANKS if n > request.tensor_parallel]

    def splits(precision: Precision) -> list[dict[str, Any]]:
        return [{"tensor_parallel": n} for n in ranks if can_split(request.config, precision, n)]

    groups = [splits(request.precision)]
    if request.precision is not Precision.FP8:
        same: list[dict[str, Any]] = [{}] if can_split(request.config, Precision.FP8, request.tensor_parallel) else []
        groups.append([{"precision": Precision.FP8, **split} for split in (*same, *splits(Precision.FP8))])
    if request.memory_bytes is None:  # otherwise a memory of one's own was asked about
        others = [t for t in TARGETS.values() if t.backend == request.target.backend and t != request.target]
        groups += [[{"target": target}] for target in others]
    return groups


def _options(change: dict[str, Any]) -> str:
    """A change as it is typed on the command line."""
    words = {
        name: value.value if isinstance(value, Precision) else value.name if isinstance(value, Target) else value
        for name, value in change.items()
    }
    return " ".join(f"--{name.replace('_', '-')} {word}" for name, word in words.items())
