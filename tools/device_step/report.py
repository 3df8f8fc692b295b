"""The figures of a run as JSON and as the table of docs/measurements/."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from angelforge.precision import Precision
from angelforge.tools.device_step.measure import Figures
from angelforge.tools.device_step.memory import Subject
from angelforge.tools.device_step.model import step_bytes
from angelforge.tools.device_step.sequences import Case
from angelforge.tools.kernel_bench.measure import Machine

HEAD = (
    "step", "through", "ms", "spread", "tok/s", "limit tok/s", "GB read", "of nominal", "of achievable",
    "experts a layer", "goal",
)  # fmt: skip
RATE_GOAL, RATE_CONTEXT = 400.0, 4096  # tok/s at batch 1, while the cache is small beside the weights
SHARE_GOAL, SHARE_BATCH = 0.80, 32  # of achievable bandwidth
LEAST_COSINE = 0.9  # of two ways to run the same kernels on the same weights; differently tiled, FP8 steps differ


@dataclass(frozen=True)
class Row:
    """One case with what follows from its time."""

    figures: Figures
    nbytes: int  # that the step must read
    tokens_per_second: float
    limit: float | None  # tok/s at nominal bandwidth; None where that is not known
    nominal_share: float | None
    achievable_share: float
    goal: str | None
    goal_met: bool | None

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.figures.case} through {self.figures.through}"


@dataclass(frozen=True)
class Report:
    """All of a run."""

    machine: Machine
    subject: Subject
    all_layers: int  # of the model, of which the subject has the first
    launches: int  # of a step, kernel by kernel; what TensorRT makes of it is not seen
    launches_by_layer: Sequence[int]
    rows: Sequence[Row]
    left_out: Sequence[tuple[Case, str]]
    failed: Sequence[str]  # cases that could not be run, and why
    notes: Sequence[str]
    versions: dict[str, str]
    date: str  # ISO 8601

    @property
    def problems(self) -> list[str]:
        """What is wrong: results, not times."""
        found = [] if self.rows or self.failed else ["no step was measured"]
        for row in self.rows:
            if not row.figures.finite:
                found.append(f"{row.name}: logits are not finite")
            if not row.figures.repeatable:
                found.append(f"{row.name}: the captured step gives other bits than the first run")
            if row.figures.trouble:
                found.append(f"{row.name}: operators could not be timed by themselves: {row.figures.trouble}")
            if row.figures.cosine is not None and not row.figures.cosine >= LEAST_COSINE:
                found.append(f"{row.name}: logits differ from the kernels', cosine {row.figures.cosine:.3f}")
        return [*found, *self.failed]

    def to_dict(self) -> dict[str, Any]:
        """Everything, for machines."""
        subject, machine = self.subject, self.machine
        return {
            "date": self.date,
            "gpu": {"name": machine.gpu_name, **asdict(machine.gpu)},
            "versions": self.versions,
            "nominal_bandwidth": machine.target.bandwidth if machine.target else None,
            "achievable_bandwidth": machine.achievable,
            "precision": subject.precision.value,
            "layers": subject.config.num_hidden_layers,
            "all_layers": self.all_layers,
            "launches": self.launches,
            "launches_by_layer": list(self.launches_by_layer),
            "problems": self.problems,
            "notes": list(self.notes),
            "steps": [_entry(row) for row in self.rows],
            "left_out": [{**asdict(case), "reason": reason} for case, reason in self.left_out],
        }

    def markdown(self) -> str:
        """The table, with what it is of above, and what is wrong or missing below."""
        gpu, subject = self.machine.gpu, self.subject
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        layers = f"{subject.config.num_hidden_layers} of {self.all_layers} layers"
        each = f"{min(self.launches_by_layer)} to {max(self.launches_by_layer)}"
        lines = [
            f"{self.machine.gpu_name} ({gpu.architecture}, {gpu.sms} SMs), {self.date}, {versions}.",
            f"{layers} in {subject.precision.value}, random weights; {self.launches} kernels a step, {each} "
            f"a layer. A read-only kernel reaches {self.machine.achievable / 1e9:.0f} GB/s.",
            "",
            _line(HEAD),
            "|---" * len(HEAD) + "|",
            *(table_line(row) for row in self.rows),
        ]
        lines += [line for row in self.rows for line in _operator_lines(row.figures)]
        lines += [f"\nnot measured: {case} {reason}." for case, reason in self.left_out]
        lines += [f"\n{note}" for note in self.notes]
        return "\n".join([*lines, *(f"\nwrong: {problem}." for problem in self.problems)])


def make_row(subject: Subject, all_layers: int, machine: Machine, figures: Figures) -> Row:
    """What follows from a case's time; goals hold for whole models, the share also for part of one."""
    case = figures.case
    nbytes, seconds = step_bytes(subject, case, figures.experts), figures.timing.median * 1e-6
    rate, achieved = case.batch / seconds, nbytes / seconds / machine.achievable
    bandwidth = machine.target.bandwidth if machine.target else None
    goal, met = None, None
    whole = subject.config.num_hidden_layers == all_layers and subject.precision is Precision.FP8
    if case.batch == 1 and case.context <= RATE_CONTEXT and whole:
        goal, met = f"≥ {RATE_GOAL:g} tok/s", rate >= RATE_GOAL
    elif case.batch == SHARE_BATCH:
        goal, met = f"≥ {100 * SHARE_GOAL:.0f} % achievable", achieved >= SHARE_GOAL
    return Row(
        figures=figures,
        nbytes=nbytes,
        tokens_per_second=rate,
        limit=case.batch * bandwidth / nbytes if bandwidth else None,
        nominal_share=nbytes / seconds / bandwidth if bandwidth else None,
        achievable_share=achieved,
        goal=goal,
        goal_met=met,
    )


def table_line(row: Row) -> str:
    """The row of the table."""
    return _line(list(_cells(row)))


def _entry(row: Row) -> dict[str, Any]:
    figures = row.figures
    return {
        **asdict(figures.case),
        "through": figures.through,
        "microseconds": asdict(figures.timing),
        "tokens_per_second": row.tokens_per_second,
        "limit_tokens_per_second": row.limit,
        "bytes": row.nbytes,
        "nominal_share": row.nominal_share,
        "achievable_share": row.achievable_share,
        "experts": list(figures.experts),
        "finite": figures.finite,
        "repeatable": figures.repeatable,
        "cosine": figures.cosine,
        "goal": row.goal,
        "goal_met": row.goal_met,
        "operators": [asdict(item) for item in figures.operators],
    }


def _cells(row: Row) -> Iterator[str]:
    experts = row.figures.experts
    yield str(row.figures.case)
    yield row.figures.through
    yield f"{row.figures.timing.median / 1000:.3f}"
    yield f"{100 * row.figures.timing.spread:.1f} %"
    yield f"{row.tokens_per_second:.0f}"
    yield "–" if row.limit is None else f"{row.limit:.0f}"
    yield f"{row.nbytes / 1e9:.2f}"
    yield "–" if row.nominal_share is None else f"{100 * row.nominal_share:.0f} %"
    yield f"{100 * row.achievable_share:.0f} %"
    yield f"{sum(experts) / len(experts):.1f}" if experts else "–"
    met = {None: "", True: ", met", False: ", missed"}[row.goal_met]
    yield "–" if row.goal is None else f"{row.goal}{met}"


def _operator_lines(figures: Figures) -> Iterator[str]:
    """A table of the operators' times of one case."""
    if not figures.operators:
        return
    total = sum(item.microseconds for item in figures.operators)
    yield f"\n{figures.case}, by operator; together {total / 1000:.3f} ms:\n"
    yield _line(("operator", "calls", "µs", "share"))
    yield "|---" * 4 + "|"
    for item in figures.operators:
        share = f"{100 * item.microseconds / total:.1f} %"
        yield _line((item.operator, str(item.calls), f"{item.microseconds:.0f}", share))


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
