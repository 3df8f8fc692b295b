"""What a precision costs: the same tokens through two graphs, each run as a whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from angelforge.bundle import Bundle
from angelforge.runtime.validate.cutting import Array
from angelforge.runtime.validate.data import Schedule
from angelforge.runtime.validate.metrics import LogitRow, log_softmax, logit_rows
from angelforge.runtime.validate.operations import JudgeGraph
from angelforge.runtime.validate.walk import walk


@dataclass(frozen=True)
class LayerExperts:
    """How alike the routing of one layer is."""

    layer: int
    same_set: float  # share of tokens with the same experts
    common: float  # share of experts that both chose


@dataclass(frozen=True)
class Study:
    """Two precisions on the same tokens."""

    expected: str
    found: str
    data: str
    rows: tuple[LogitRow, ...]
    perplexity: tuple[float, float]  # of the expected and the found side, of each next token; nan without one
    relative_error: float  # ‖found − expected‖ / ‖expected‖ of all logits
    experts: tuple[LayerExperts, ...]

    def figures(self) -> list[tuple[str, str]]:
        """Names and values, to read."""
        kl = np.array([row.kl for row in self.rows])
        before, after = self.perplexity
        return [
            ("positions", str(len(self.rows))),
            ("mean KL, nats", f"{kl.mean():.3e}"),
            ("largest KL, nats", f"{kl.max():.3e}"),
            ("perplexity", f"{before:.4f} → {after:.4f} ({after / before - 1:+.3%})"),
            ("same best token", f"{np.mean([row.top1 for row in self.rows]):.2%}"),
            ("five best in common", f"{np.mean([row.top5 for row in self.rows]):.2%}"),
            ("relative error of the logits", f"{self.relative_error:.3%}"),
        ]

    def to_dict(self) -> dict[str, Any]:
        """For machines."""
        kl = np.array([row.kl for row in self.rows])
        return {
            "expected": self.expected,
            "found": self.found,
            "data": self.data,
            "positions": len(self.rows),
            "mean_kl": float(kl.mean()),
            "max_kl": float(kl.max()),
            "perplexity": [None if np.isnan(value) else value for value in self.perplexity],
            "top1": float(np.mean([row.top1 for row in self.rows])),
            "top5": float(np.mean([row.top5 for row in self.rows])),
            "relative_error": self.relative_error,
            "experts": [asdict(layer) for layer in self.experts],
            "by_position": [asdict(row) for row in self.rows],
        }


@dataclass(frozen=True, eq=False)
class Side:
    """A graph with its weights, and what it is in words."""

    name: str
    bundle: Bundle
    judge: JudgeGraph


def study(expected: Side, found: Side, schedule: Schedule, data: str, report: Callable[[int, int], None]) -> Study:
    """Runs both sides; memory is one layer's and the logits of both. Raises AngelForgeError where one cannot run."""
    total = len(expected.judge.stages) + len(found.judge.stages)
    wanted = _run(expected, schedule, lambda done: report(done, total))
    had = _run(found, schedule, lambda done: report(len(expected.judge.stages) + done, total))
    rows: list[LogitRow] = []
    for step, left, right in zip(schedule.steps, wanted.logits, had.logits, strict=True):
        rows += logit_rows(right, left, step.rows)
    error = np.sqrt(sum(float(((a - b) ** 2).sum()) for a, b in zip(had.logits, wanted.logits, strict=True)))
    norm = np.sqrt(sum(float((a**2).sum()) for a in wanted.logits))
    return Study(
        expected.name,
        found.name,
        data,
        tuple(sorted(rows, key=lambda row: (row.sequence, row.position))),
        (_perplexity(wanted.logits, schedule), _perplexity(had.logits, schedule)),
        float(error / norm),
        tuple(_alike(layer, wanted.experts[layer], had.experts[layer]) for layer in sorted(wanted.experts)),
    )


@dataclass(frozen=True, eq=False)
class _Run:
    logits: list[Array]  # f32 [rows, vocab] of every call
    experts: dict[int, list[Array]]  # of every layer, by call: int32 [tokens, k], sorted


def _run(side: Side, schedule: Schedule, report: Callable[[int], None]) -> _Run:
    logits: list[Array] = []
    experts: dict[int, list[Array]] = {}
    for call in walk(side.judge, side.bundle, schedule):
        step = schedule.steps[call.step]
        if "logits" in call.stage.outputs:
            logits.append(np.array(call.values["logits"][: len(step.rows)]))
        for operation in call.stage.operations:
            if operation.kind == "MoERoute" and call.stage.layer is not None:
                chosen = call.values[operation.outputs[0]][: int(step.batch.num_tokens[0])]
                experts.setdefault(call.stage.layer, []).append(np.sort(chosen, axis=1))
        report(side.judge.stages.index(call.stage) + 1)
    return _Run(logits, experts)


def _alike(layer: int, expected: Sequence[Array], found: Sequence[Array]) -> LayerExperts:
    wanted, had = np.concatenate(expected), np.concatenate(found)
    common = [len(np.intersect1d(a, b)) / len(a) for a, b in zip(wanted, had, strict=True)]
    return LayerExperts(layer, float((wanted == had).all(axis=1).mean()), float(np.mean(common)))


def _perplexity(logits: Sequence[Array], schedule: Schedule) -> float:
    """exp of the mean negative log-probability of every token that follows another."""
    losses = []
    for step, values in zip(schedule.steps, logits, strict=True):
        logs = log_softmax(values)
        for row, (sequence, position) in enumerate(step.rows):
            ids = schedule.sequences[sequence]
            if position + 1 < len(ids):
                losses.append(-logs[row, ids[position + 1]])
    return float(np.exp(np.mean(losses))) if losses else float("nan")
