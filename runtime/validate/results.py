"""A validation's findings, ready to be told: verdict, first diverging tensor, figures by place, JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from angelforge.runtime.validate.compare import Finding, first_failure
from angelforge.runtime.validate.thresholds import Thresholds
from angelforge.runtime.validate.whole import Whole


@dataclass(frozen=True)
class Validation:
    """Everything that one command compared."""

    subject: str  # the bundle or checkpoint
    precision: str
    engine: str
    data: str  # what tokens were run, in words
    limits: Thresholds
    wholes: tuple[Whole, ...] = ()
    layers: tuple[Finding, ...] = ()  # each layer with the judge's inputs
    operators: tuple[Finding, ...] = ()  # each operator with the judge's inputs
    halves: tuple[Finding, ...] = ()  # each half layer of the bundle beside the reference's checkpoint
    checkpoint: str | None = None  # that the reference is made of
    draft: bool = False  # of the bundle's draft

    @property
    def title(self) -> str:
        """What was compared, in words."""
        return f"the draft of {self.subject}" if self.draft else self.subject

    @property
    def ok(self) -> bool:
        """Whether everything that is judged is within its limit."""
        return all(whole.ok for whole in self.wholes) and all(
            f.ok for f in (*self.layers, *self.operators, *self.halves)
        )

    @property
    def first(self) -> Finding | None:
        """The first tensor beyond its limit: of the operators where these were run, else of the layers."""
        located = first_failure(self.operators) or first_failure(self.layers) or first_failure(self.halves)
        return located or next((whole.first for whole in self.wholes if whole.first is not None), None)

    def to_dict(self) -> dict[str, Any]:
        """For machines; numbers that JSON cannot hold are null."""
        value = {
            "ok": self.ok,
            "subject": self.title,
            "precision": self.precision,
            "engine": self.engine,
            "data": self.data,
            "thresholds": asdict(self.limits),
            "first_diverging": None if self.first is None else finding_dict(self.first),
            "whole": [
                {
                    "expected": w.expected,
                    "found": w.found,
                    **w.summary(),
                    "tensors": [finding_dict(f) for f in worst_by_tensor(w.findings)],
                    "by_position": [asdict(r) for r in w.rows],
                }
                for w in self.wholes
            ],
            "layers": [finding_dict(f) for f in worst_by_tensor(self.layers)],
            "operators": [finding_dict(f) for f in worst_by_tensor(self.operators)],
            "halves": [finding_dict(f) for f in self.halves],
        }
        cleaned: dict[str, Any] = _finite(value)
        return cleaned


def finding_dict(finding: Finding) -> dict[str, Any]:
    """One tensor, for JSON."""
    raw = asdict(finding)
    return {**{k: v for k, v in raw.items() if k != "result"}, **raw["result"], "inputs": dict(finding.inputs)}


def worst_by_tensor(findings: Iterable[Finding]) -> list[Finding]:
    """Of every tensor the call in which it differs most, failures first; in the order of the graph."""
    kept: dict[tuple[str, str], Finding] = {}
    for finding in findings:
        key = (finding.place, finding.tensor)
        other = kept.get(key)
        if other is None or (not finding.ok, finding.error) > (not other.ok, other.error):
            kept[key] = finding
    return list(kept.values())


def error_by_place(findings: Sequence[Finding]) -> dict[str, float]:
    """The largest relative error of each layer, in the order of the graph."""
    found: dict[str, float] = {}
    for finding in findings:
        found[finding.place] = max(found.get(finding.place, 0.0), finding.error)
    return found


def describe(finding: Finding) -> list[str]:
    """The first diverging tensor in words: where, what, shapes, the worst elements with both values."""
    shape = "×".join(map(str, finding.result.shape))
    limit = "" if finding.limit is None else f", limit {finding.limit:.1e}"
    lines = [
        f"first diverging tensor: {finding.place}, {finding.operator}: {finding.tensor} [{shape}], call {finding.step}",
        f"  relative error {finding.error:.2e}{limit}, largest difference {finding.result.max_error:.3g}, "
        f"cosine {finding.result.cosine:.6f}" + (f"; {finding.note}" if finding.note else ""),
    ]
    for worst in finding.result.worst:
        lines.append(f"  at {list(worst.index)}: expected {worst.expected:.7g}, found {worst.found:.7g}")
    if finding.inputs:
        told = ", ".join(f"{name} [{'×'.join(map(str, shape))}]" for name, shape in finding.inputs)
        lines.append(f"  given: {told}")
    return lines


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
