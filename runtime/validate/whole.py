"""The whole model on two sides, call by call, in Polygraphy's Comparator."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from polygraphy.comparator import Comparator
from polygraphy.logger import G_LOGGER

from angelforge.runtime.validate.compare import Finding
from angelforge.runtime.validate.data import Schedule
from angelforge.runtime.validate.metrics import LogitRow, difference, logit_rows
from angelforge.runtime.validate.runners import BundleRunner, feed_dict
from angelforge.runtime.validate.thresholds import Thresholds


@dataclass(frozen=True)
class Whole:
    """What a comparison of whole models found."""

    expected: str  # the runner that is taken to be right
    found: str
    rows: tuple[LogitRow, ...]  # every position, by sequence and position
    findings: tuple[Finding, ...]  # logits, and keys and values by layer, of every call

    @property
    def ok(self) -> bool:
        """Whether everything that is judged is within its limit."""
        return all(finding.ok for finding in self.findings)

    @property
    def first(self) -> Finding | None:
        """The first tensor beyond its limit in the order of the layers, of the earliest call."""
        wrong = [finding for finding in self.findings if not finding.ok]
        return min(wrong, key=lambda f: (f.step, not f.place.startswith("layer"), _number(f.place)), default=None)

    def summary(self) -> dict[str, Any]:
        """The figures of the logits."""
        kl = np.array([row.kl for row in self.rows])
        logits = [f.result for f in self.findings if f.tensor == "logits"]
        return {
            "positions": len(self.rows),
            "max_error": max(r.max_error for r in logits),
            "relative_error": max(r.relative_error for r in logits),
            "cosine": min(r.cosine for r in logits),
            "mean_kl": float(kl.mean()),
            "max_kl": float(kl.max()),
            "top1": float(np.mean([row.top1 for row in self.rows])),
            "top5": float(np.mean([row.top5 for row in self.rows])),
        }


def compare_whole(expected: BundleRunner, found: BundleRunner, schedule: Schedule, limits: Thresholds) -> Whole:
    """Runs both on every packed call. Outputs that one side does not give are not compared.

    Raises:
        AngelForgeError: a side cannot run.
    """
    meter = _Meter(schedule, limits)
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        results = Comparator.run(
            [expected, found], data_loader=[feed_dict(step.batch) for step in schedule.steps], streaming=True
        )
        Comparator.compare_accuracy(results, compare_func=meter)
    rows = tuple(sorted(meter.rows, key=lambda row: (row.sequence, row.position)))
    return Whole(expected.name, found.name, rows, tuple(meter.findings))


@dataclass
class _Meter:
    """A compare function of Polygraphy's that keeps what it measures."""

    schedule: Schedule
    limits: Thresholds
    rows: list[LogitRow] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    step: int = 0

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
                self.rows += logit_rows(had, wanted, step.rows)
            result, limit = difference(had, wanted), self.limits.logits
            place, operator = _meaning(name)
            ok = limit is None or result.relative_error <= limit
            self.findings.append(Finding(place, operator, name, self.step, result, limit, ok))
            verdicts[name] = ok
        self.step += 1
        return verdicts


def _meaning(name: str) -> tuple[str, str]:
    """Where an output of a runner comes from, and what made it."""
    if name.startswith("cache."):
        return f"layer {name.removeprefix('cache.')}", "keys and values in the pool"
    return ("head", "Linear (lm_head)") if name == "logits" else ("captured states", "Linear (fc)")


def _number(place: str) -> int:
    return int(place.removeprefix("layer ")) if place.startswith("layer ") else 0
