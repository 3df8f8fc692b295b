"""The rows of other engines' kernels, as JSON and as a table."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from angelforge.tools.kernel_bench.compare import Verdict
from angelforge.tools.kernel_bench.work import Work

HEAD = ("call", "kernel", "µs", "ours µs", "ours / theirs", "difference / limit", "note")


@dataclass(frozen=True)
class Beside:
    """One kernel of another engine at one call. Without `microseconds`, `problem` says why."""

    work: Work
    engine: str
    kernel: str
    note: str  # what it does more or less than ours
    ours: float  # µs
    microseconds: float | None = None
    difference: Verdict | None = None
    problem: str = ""
    uncaptured: bool = False  # its capture in a CUDA graph failed

    @property
    def name(self) -> str:
        """For sentences."""
        return f"{self.engine} {self.kernel} at {self.work.name}"

    @property
    def ratio(self) -> float | None:
        """Our time over its: below 1 ours is faster."""
        return None if self.microseconds is None else self.ours / self.microseconds


@dataclass(frozen=True)
class Comparison:
    """All that a run says of other engines."""

    rows: Sequence[Beside]
    versions: Mapping[str, str]  # of the engines that load
    absent: Sequence[str]  # engines that are not installed
    broken: Sequence[str]  # sentences on engines that do not load
    lost: str = ""  # the kernel after which the GPU did not answer any more
    left: Sequence[str] = ()  # calls that the time did not suffice for

    @property
    def suspect_after(self) -> Beside | None:
        """The first row whose capture failed, where rows with figures follow: torch may not be quite as it was."""
        failed = [place for place, row in enumerate(self.rows) if row.uncaptured]
        later = [row for row in self.rows[failed[0] + 1 :] if row.microseconds is not None] if failed else []
        return self.rows[failed[0]] if later else None

    def to_dict(self) -> dict[str, Any]:
        """Everything, for machines."""
        suspect = self.suspect_after
        return {
            "versions": dict(self.versions),
            "not_installed": list(self.absent),
            "not_loaded": list(self.broken),
            "gpu_lost_after": self.lost or None,
            "suspect_after": None if suspect is None else suspect.name,
            "skipped": list(self.left),
            "rows": [_entry(row) for row in self.rows],
        }

    def markdown(self) -> list[str]:
        """The lines of the table, and what is missing."""
        used = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        lines = ["", f"Other engines' kernels on the same inputs: {used or 'none is installed'}."]
        if self.rows:
            lines += ["", _line(HEAD), "|---" * len(HEAD) + "|", *(_line(_cells(row)) for row in self.rows)]
        lines += [f"- {name} is not installed." for name in self.absent]
        lines += [f"- {sentence}" for sentence in self.broken]
        if suspect := self.suspect_after:
            lines.append(f"- The capture of {suspect.name} failed: figures of the rows below it are suspect.")
        if self.lost:
            lines.append(f"- The GPU did not answer after {self.lost}: what would follow was left out.")
        if self.left:
            lines.append(f"- No time was left for {len(self.left)} calls: {'; '.join(self.left)}.")
        return lines


def _entry(row: Beside) -> dict[str, Any]:
    return {
        "operator": row.work.operator.name,
        "call": row.work.label,
        "tokens": row.work.tokens,
        "engine": row.engine,
        "kernel": row.kernel,
        "note": row.note,
        "microseconds": row.microseconds,
        "ours_microseconds": row.ours,
        "ratio": row.ratio,
        "difference": None if row.difference is None else asdict(row.difference),
        "problem": row.problem or None,
    }


def _cells(row: Beside) -> Sequence[str]:
    verdict = row.difference
    return (
        row.work.name,
        f"{row.engine} {row.kernel}",
        "–" if row.microseconds is None else f"{row.microseconds:.1f}",
        f"{row.ours:.1f}",
        "–" if row.ratio is None else f"{row.ratio:.2f}",
        "–" if verdict is None else f"{verdict.error / verdict.limit:.2g}",
        "; ".join(part for part in (row.problem, row.note) if part),
    )


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
