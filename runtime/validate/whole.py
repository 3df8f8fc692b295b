"""The whole model on two sides, call by call, in Polygraphy's Comparator."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from polygraphy.comparator import Comparator
from polygraphy.logger import G_LOGGER

from angelforge.runtime.validate.compare import Finding
from angelforge.runtime.validate.data import Schedule
from angelforge.runtime.validate.metrics import Array, LogitRow, difference, logit_rows
from angelforge.runtime.validate.runners import BundleRunner, ReferenceRunner, feed_dict
from angelforge.runtime.validate.thresholds import Thresholds


@dataclass(frozen=True)
class Whole:
    """What a comparison of whole models found."""

    expected: str  # the runner that is taken to be right
    found: str
    rows: tuple[LogitRow, ...]  # every position, by sequence and position
    findings: tuple[Finding, ...]  # logits, and keys and values by layer, of every call
    reference: bool = False  # the bundle's graph beside a reference, and not an engine beside the graph
    alone: tuple[Finding, ...] = ()  # those that fail by themselves, and not only as all calls together

    @property
    def ok(self) -> bool:
        """Whether everything that is judged is within its limit; nothing is not enough."""
        return bool(self.rows) and all(finding.ok for finding in self.findings)

    @property
    def first(self) -> Finding | None:
        """The first tensor beyond its limit in the order of the layers, of the earliest call.

        Where tensors fail only as all calls together, no call is wrong by itself: the first of them in its worst call.
        """
        if self.alone:
            return min(self.alone, key=lambda f: (f.step, *_order(f)))
        wrong = [finding for finding in self.findings if not finding.ok]
        return min(wrong, key=lambda f: (*_order(f), -f.error), default=None)

    def summary(self) -> dict[str, Any]:
        """The figures of the logits; NaN where their shapes differ."""
        kl = np.array([row.kl for row in self.rows] or [np.nan])
        logits = [f.result for f in self.findings if f.tensor == "logits"]
        return {
            "positions": len(self.rows),
            "max_error": max(r.max_error for r in logits),
            "relative_error": max(r.relative_error for r in logits),
            "cosine": min(r.cosine for r in logits),
            "mean_kl": float(kl.mean()),
            "max_kl": float(kl.max()),
            "top1": float(np.mean([float(row.top1) for row in self.rows] or [np.nan])),
            "top5": float(np.mean([float(row.top5) for row in self.rows] or [np.nan])),
        }


def compare_whole(expected: BundleRunner, found: BundleRunner, schedule: Schedule, limits: Thresholds) -> Whole:
    """Runs both on every packed call. Outputs that one side does not give are not compared.

    Raises:
        AngelForgeError: a side cannot run.
    """
    meter = _Meter(schedule, limits)
    # Polygraphy takes variances for a log that is off, also of infinities, which NumPy would warn of.
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL), np.errstate(invalid="ignore"):
        results = Comparator.run(
            [expected, found], data_loader=[feed_dict(step.batch) for step in schedule.steps], streaming=True
        )
        Comparator.compare_accuracy(results, compare_func=meter)
    rows = tuple(sorted(meter.rows, key=lambda row: (row.sequence, row.position)))
    alone = tuple(finding for finding in meter.findings if not finding.ok)
    return Whole(expected.name, found.name, rows, tuple(meter.judged()), isinstance(expected, ReferenceRunner), alone)


@dataclass
class _Meter:
    """A compare function of Polygraphy's that keeps what it measures."""

    schedule: Schedule
    limits: Thresholds
    rows: list[LogitRow] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    step: int = 0
    products: dict[str, Array] = field(default_factory=dict)  # of each tensor's sides over all calls: e·f, e·e, f·f

    def __call__(self, expected: Mapping[str, Any], found: Mapping[str, Any]) -> OrderedDict[str, bool]:
        """Compares one call; each output is ok or not."""
        step = self.schedule.steps[self.step]
        verdicts: OrderedDict[str, bool] = OrderedDict()
        for name in expected:
            if name not in found:
                continue
            wanted, had = np.asarray(expected[name]), np.asarray(found[name])
            if name == "logits":
                wanted, had = wanted[: len(step.rows)], had[: len(step.rows)]
            ok = self._compare(name, wanted, had, step.rows)
            verdicts[name] = ok
        self.step += 1
        return verdicts

    def _compare(self, name: str, wanted: Array, had: Array, rows: tuple[tuple[int, int], ...]) -> bool:
        result, limit = difference(had, wanted), self.limits.logits
        if limit is None and name == "cache.0":
            limit = self.limits.first_cache
        ok, note = limit is None or result.relative_error <= limit, ""
        if wanted.shape != had.shape:
            ok, note = False, f"found {list(had.shape)}, expected {list(wanted.shape)}"
        else:
            a, b = (side.astype(np.float64).ravel() for side in (wanted, had))
            if not (np.isfinite(a).all() and np.isfinite(b).all()):
                ok, note = False, "a value is not finite"
            with np.errstate(invalid="ignore", over="ignore"):
                products = np.array([(x * y).sum() for x, y in ((a, b), (a, a), (b, b))])
                self.products[name] = self.products.get(name, 0.0) + products
            if name == "logits":
                self.rows += logit_rows(had, wanted, rows)
        place, operator = _meaning(name)
        self.findings.append(Finding(place, operator, name, self.step, result, limit, ok, note))
        return ok

    def judged(self) -> list[Finding]:
        """The findings, failed where all calls together have another direction or say something else."""
        notes = {}
        for name, (dot, wanted, had) in self.products.items():
            norms = float(np.sqrt(wanted) * np.sqrt(had))
            cosine = dot / norms if norms else float(wanted == had)
            if not cosine >= self.limits.cosine:
                notes[name] = f"cosine {cosine:.3f} over all calls, at least {self.limits.cosine} is needed"
        kl = float(np.mean([row.kl for row in self.rows] or [np.nan]))
        if not kl <= self.limits.kl:
            notes.setdefault("logits", f"mean KL {kl:.3g} nats, at most {self.limits.kl} is allowed")
        return [replace(f, ok=False, note=f.note or notes[f.tensor]) if f.tensor in notes else f for f in self.findings]


def _meaning(name: str) -> tuple[str, str]:
    """Where an output of a runner comes from, and what made it."""
    if name.startswith("cache."):
        return f"layer {name.removeprefix('cache.')}", "keys and values in the pool"
    return ("head", "Linear (lm_head)") if name == "logits" else ("captured states", "Linear (fc)")


def _order(finding: Finding) -> tuple[bool, int]:
    """Layers first, by their numbers."""
    layer = finding.place.startswith("layer ")
    return not layer, int(finding.place.removeprefix("layer ")) if layer else 0
