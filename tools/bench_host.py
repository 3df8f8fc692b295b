"""`angelforge bench host`: what a step costs beside the engine, with an engine that computes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import click

from angelforge.tools.gpu_needed import require_kernels
from angelforge.tools.options import json_option
from angelforge.tools.output import print_json, print_table

if TYPE_CHECKING:
    from angelforge.tools.host_work import Timed

GOALS = {1: 200.0, 32: 1000.0}  # µs


@dataclass(frozen=True)
class Row:
    """Medians of one batch size, µs a step."""

    batch: int
    proposals: int  # of a draft, for each sequence
    tokens: float  # that a step gives, of all sequences: every proposal comes out
    host: float  # everything but the engine and, on the host, the arithmetic of sampling
    least: float  # of the same, the fastest step: what other programs disturb least
    slow: float  # of the same, what 99 % of the steps do not exceed
    launch: float  # of it: choosing the captured size, padding, the one copy, launching the captured step
    ask: float  # of it: what a device that samples is told, in one copy, its launches, and what it answers
    idle: float  # of it: all but what is done while the GPU computes the target's step
    draft: float | None  # of it: packing and launching the draft's calls, taking what they propose, remembering it
    numpy: float | None  # what sampling in NumPy takes instead of `ask`; None with a draft
    bound: float  # once for each captured size: binding 614 tensors
    goal: float | None

    @classmethod
    def of(cls, batch: int, proposals: int, device: Timed, host: Timed | None) -> Row:
        """From the times of a run that only asks a device for samples, and of one that samples in NumPy."""
        steps = sorted(device.steps)
        return cls(
            batch,
            proposals,
            median(device.tokens),
            median(steps),
            steps[0],
            steps[len(steps) * 99 // 100],
            median(device.launches),
            median(device.draws),
            median(device.idle),
            median(device.drafts) if device.drafts else None,
            median(host.draws) if host else None,
            device.bound,
            None if proposals else GOALS.get(batch),
        )

    def columns(self) -> tuple[float | None, ...]:
        """In the order of the table that is printed."""
        whole = (self.host, self.least, self.slow)
        parts = (self.launch, self.ask, self.draft, self.idle)
        return self.batch, self.proposals, self.tokens, *whole, *parts, self.goal, self.numpy, self.bound


@click.command()
@click.option("--batch", "batches", type=click.IntRange(1, 256), multiple=True, help="Sequences; may be given again.")
@click.option("--steps", type=click.IntRange(min=10), default=300, show_default=True, help="Steps to measure.")
@click.option("--prompt", type=click.IntRange(1, 100_000), default=1000, show_default=True, help="Tokens of a prompt.")
@click.option(
    "--speculate",
    type=click.IntRange(0, 15),
    metavar="N",
    default=0,
    show_default=True,
    help="Then measure steps with N proposals for each sequence, too.",
)
@json_option
def host(batches: tuple[int, ...], steps: int, prompt: int, speculate: int, as_json: bool) -> None:
    """Time the host's work in a decoding step: schedule, pack, bind, launch, ask for samples, detokenise, hand out.

    The stepper, the runner and the sampler are those of a TensorRT engine at AntAngelMed's sizes; every request has
    penalties, a temperature, top-k, top-p and stop strings, and the tokenizer has 157,184 ids. On a GPU all is
    launched, and waited for; without one, the sampling kernels are compiled for Hopper and launched on nothing, so
    that only the driver's own time is missing. What a GPU waits for stands under "GPU idle": the rest is done while
    it computes the step.

    With --speculate N a draft that computes nothing proposes N tokens for each sequence, and all of them come out: the
    most that a step can have to verify, to take and to propose again.

    \b
    Example:
      angelforge bench host --batch 1 --batch 32
      angelforge bench host --speculate 3
    """
    require_kernels("bench host")
    from angelforge.tools.host_work import measure

    few = max(10, steps // 5)
    rows = []
    for batch in batches or GOALS:
        rows.append(Row.of(batch, 0, measure(batch, steps, prompt, False), measure(batch, few, prompt, True)))
        if speculate:
            rows.append(Row.of(batch, speculate, measure(batch, steps, prompt, False, speculate), None))
    if as_json:
        print_json([vars(row) for row in rows])
        return
    print_table(
        (
            "batch",
            "proposals",
            "tokens",
            "host µs",
            "fastest",
            "99 %",
            "of it launch",
            "of it ask",
            "of it draft",
            "GPU idle",
            "goal",
            "NumPy sampling",
            "bound once",
        ),
        [tuple("" if value is None else f"{value:.0f}" for value in row.columns()) for row in rows],
    )
