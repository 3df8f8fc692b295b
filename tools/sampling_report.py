"""The figures of `bench sampling`, as JSON and as the table of docs/measurements/."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import torch

from angelforge.plugins.compile import COMPILER
from angelforge.runtime.device_kernels import KernelWork
from angelforge.runtime.device_torch import TorchWork
from angelforge.tools.kernel_bench.failures import LAUNCH_ERRORS, answers, reason
from angelforge.tools.kernel_bench.statistics import Timing
from angelforge.tools.kernel_bench.timing import time_calls
from angelforge.tools.sampling_bench import KINDS, check, work_of_a_step
from angelforge.tools.sampling_round import check_round

GOAL_ROWS, GOAL = 32, 50.0  # µs at so many rows
ROWS = (1, GOAL_ROWS, 160)  # the last: 32 requests with four proposals each


@dataclass(frozen=True)
class Figure:
    """One kind of rules at a number of rows, µs of a step."""

    rules: str
    rows: int
    ours: Timing
    torch: Timing | None  # the same as torch operations; None where they fail
    right: bool

    def line(self) -> str:
        """Of the table."""
        cells = (self.rules, self.rows, f"{self.ours.median:.1f}", f"{self.ours.spread:.0%}")
        beside = "not run"
        if self.torch is not None:
            beside = f"{self.torch.median:.0f} ({self.torch.median / self.ours.median:.1f} ×)"
        return f"| {' | '.join(map(str, cells))} | {beside} | {'yes' if self.right else 'NO'} |"


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
        verdict = f"missed: {', '.join(late)}" if late else "met by all that ran"
        return "\n".join([*lines, "", f"Goal at {GOAL_ROWS} rows, {GOAL:.0f} µs: {verdict}.", *self.problems])


def measure_all(
    gpu: str,
    device: torch.device,
    vocab: int,
    seed: int,
    say: Callable[[str], None],
    save: Callable[[Report], None],
) -> Report:
    """Every kind of rules at every number of rows; `save` gets what is known after each.

    What fails is told among the problems, and the rest goes on as long as the GPU answers.
    """
    report, work, by_torch = Report(gpu, vocab), KernelWork(), TorchWork()
    say("A step that asks for everything")
    try:
        report = replace(report, problems=tuple(check_round(work, vocab, device, seed)))
    except LAUNCH_ERRORS as error:
        report = replace(report, problems=(f"a step that asks for everything: {reason(error)}",))
        if not answers(device.type):
            save(report)
            return report
    for rules, rows in product(KINDS, ROWS):
        say(f"{rules}, {rows} rows")
        try:
            wrong = check(work, rules, rows, vocab, device, seed)
            ours = time_calls([work_of_a_step(rules, rows, vocab, device, work)])
        except LAUNCH_ERRORS as error:
            report = replace(report, problems=(*report.problems, f"{rules}, {rows} rows: {reason(error)}"))
            save(report)
            if not answers(device.type):
                return report
            continue
        theirs = None
        try:
            theirs = time_calls([work_of_a_step(rules, rows, vocab, device, by_torch)])
        except LAUNCH_ERRORS as error:  # a lack of memory, or what a capture does not take: no fault of ours
            say(f"As torch operations: {reason(error)}")
        figure = Figure(rules, rows, ours, theirs, not wrong)
        report = replace(report, figures=(*report.figures, figure), problems=(*report.problems, *wrong))
        save(report)
    return report
