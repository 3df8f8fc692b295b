"""The figures of `bench sampling`, as JSON and as the table of docs/measurements/."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from angelforge.plugins.compile import COMPILER
from angelforge.runtime.device_kernels import KernelWork
from angelforge.runtime.device_torch import TorchWork
from angelforge.tools.kernel_bench.statistics import Timing
from angelforge.tools.kernel_bench.timing import time_calls
from angelforge.tools.sampling_bench import KINDS, check, work_of_a_step

GOAL_ROWS, GOAL = 32, 50.0  # µs at so many rows
ROWS = (1, GOAL_ROWS, 160)  # the last: 32 requests with four proposals each


@dataclass(frozen=True)
class Figure:
    """One kind of rules at a number of rows, µs of a step."""

    rules: str
    rows: int
    ours: Timing
    torch: Timing  # the same as torch operations
    right: bool

    def line(self) -> str:
        """Of the table."""
        ours, theirs = self.ours, self.torch.median
        cells = (self.rules, self.rows, f"{ours.median:.1f}", f"{ours.spread:.0%}")
        ratio = f"{theirs:.0f} ({theirs / ours.median:.1f} ×)"
        return f"| {' | '.join(map(str, cells))} | {ratio} | {'yes' if self.right else 'NO'} |"


@dataclass(frozen=True)
class Report:
    """What is known so far."""

    gpu: str
    vocab: int
    figures: tuple[Figure, ...] = ()
    problems: tuple[str, ...] = ()
    versions: str = f"torch {torch.__version__}, {COMPILER}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "goal_rows": GOAL_ROWS, "goal_us": GOAL}

    def markdown(self) -> str:
        """A table, what misses the goal, and what is wrong."""
        lines = [f"{self.gpu}, {self.versions}, {self.vocab} ids", ""]
        lines += ["| rules | rows | µs | spread | as torch operations, µs | right |", "|---|---|---|---|---|---|"]
        lines += [each.line() for each in self.figures]
        late = [each.rules for each in self.figures if each.rows == GOAL_ROWS and each.ours.median > GOAL]
        verdict = f"missed: {', '.join(late)}" if late else "met by all"
        return "\n".join([*lines, "", f"Goal at {GOAL_ROWS} rows, {GOAL:.0f} µs: {verdict}.", *self.problems])


def measure_all(
    gpu: str,
    device: torch.device,
    vocab: int,
    seed: int,
    say: Callable[[str], None],
    save: Callable[[Report], None],
) -> Report:
    """Every kind of rules at every number of rows; `save` gets what is known after each."""
    report, work, by_torch = Report(gpu, vocab), KernelWork(), TorchWork()
    for rules in KINDS:
        for rows in ROWS:
            say(f"{rules}, {rows} rows")
            wrong = check(work, rules, rows, vocab, device, seed)
            ours, theirs = (time_calls([work_of_a_step(rules, rows, vocab, device, by)]) for by in (work, by_torch))
            figure = Figure(rules, rows, ours, theirs, not wrong)
            report = replace(report, figures=(*report.figures, figure), problems=(*report.problems, *wrong))
            save(report)
    return report
