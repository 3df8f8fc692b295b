"""The figures of a run as JSON and as the tables of docs/measurements/."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from angelforge.tools.kernel_bench.checks import BodyCheck
from angelforge.tools.kernel_bench.measure import Machine, Measurement
from angelforge.tools.kernel_bench.rivals.comparison import Comparison

HEAD = (
    "call", "tile m×n×k, warps, stages", "µs", "spread", "limit µs", "GB/s", "TFLOP/s", "of nominal", "of achievable",
    "of peak", "error / limit", "PTX", "torch µs (ours / torch)", "goal",
)  # fmt: skip


@dataclass(frozen=True)
class Report:
    """All of a run."""

    machine: Machine
    versions: dict[str, str]
    date: str  # ISO 8601
    checks: Sequence[BodyCheck]
    measurements: Sequence[Measurement]
    skipped: Sequence[str]  # calls that the time did not suffice for
    failed: Sequence[str]  # calls that could not be run, and why
    others: Comparison | None = None  # other engines' kernels, measured after all this; nothing there makes a run fail

    @property
    def problems(self) -> list[str]:
        """What is wrong: results, not times."""
        wrong = [
            f"{check.work.name} {_tile(check.tile)} differs from its body: {check.verdict.output} by "
            f"{check.verdict.error:.2g}, limit {check.verdict.limit:g}"
            for check in self.checks
            if not check.verdict.ok
        ]
        for m in self.measurements:
            if m.verdict is not None and not m.verdict.ok:
                wrong.append(f"{m.work.name}: {m.verdict.output} is off by {m.verdict.error:.2g}")
            if m.ptx_equal is False:
                wrong.append(f"{m.work.name}: the PTX for TensorRT gives other bits than Triton's launch")
        return [*wrong, *self.failed]

    def to_dict(self) -> dict[str, Any]:
        """Everything, for machines."""
        return {
            "date": self.date,
            "gpu": {"name": self.machine.gpu_name, **asdict(self.machine.gpu)},
            "achievable_bandwidth": self.machine.achievable,
            "versions": self.versions,
            "problems": self.problems,
            "skipped": list(self.skipped),
            "body_checks": [
                {"call": c.work.name, "tile": asdict(c.tile), **asdict(c.verdict), "ok": c.verdict.ok}
                for c in self.checks
            ],
            "measurements": [_entry(m) for m in self.measurements],
            "other_engines": None if self.others is None else self.others.to_dict(),
        }

    def markdown(self) -> str:
        """The table, with what it is of above, and what is wrong or missing below."""
        gpu, rights = self.machine.gpu, sum(c.verdict.ok for c in self.checks)
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        lines = [
            f"{self.machine.gpu_name} ({gpu.architecture}, {gpu.sms} SMs), {self.date}, {versions}.",
            f"A read-only kernel reaches {self.machine.achievable / 1e9:.0f} GB/s. "
            f"{rights} of {len(self.checks)} checks against function bodies hold.",
            "",
            _line(HEAD),
            "|---" * len(HEAD) + "|",
            *(_line(list(_cells(m))) for m in self.measurements),
        ]
        lines += [f"\nNo time was left for {len(self.skipped)} calls: {'; '.join(self.skipped)}."] * bool(self.skipped)
        lines += [f"\nwrong: {problem}" for problem in self.problems]
        return "\n".join(lines)


def _entry(m: Measurement) -> dict[str, Any]:
    return {
        "operator": m.work.operator.name,
        "call": m.work.label,
        "tokens": m.work.tokens,
        "dims": dict(m.work.dims),
        "tile": asdict(m.tile),
        "microseconds": asdict(m.timing),
        "limit_microseconds": m.limit,
        **asdict(m.cost),
        "nominal_share": m.nominal_share,
        "achievable_share": m.achievable_share,
        "peak_share": m.peak_share,
        "error": None if m.verdict is None else asdict(m.verdict),
        "ptx_equal": m.ptx_equal,
        "torch": None if m.rival is None else {"call": m.rival[0], "microseconds": m.rival[1], "ratio": m.rival_ratio},
        "goal": None if m.goal is None else str(m.goal),
        "goal_met": m.goal_met,
    }


def _cells(m: Measurement) -> Iterator[str]:
    seconds = m.timing.median * 1e-6
    yield m.work.name
    yield _tile(m.tile)
    yield f"{m.timing.median:.1f}"
    yield f"{100 * m.timing.spread:.0f} %"
    yield "–" if m.limit is None else f"{m.limit:.1f}"
    yield f"{m.cost.nbytes / seconds / 1e9:.0f}"
    yield f"{m.cost.flops / seconds / 1e12:.1f}" if m.cost.flops else "–"
    for share in (m.nominal_share, m.achievable_share, m.peak_share):
        yield "–" if share is None else f"{100 * share:.0f} %"
    yield "–" if m.verdict is None else f"{m.verdict.error / m.verdict.limit:.2g}"
    yield {None: "–", True: "equal", False: "DIFFERS"}[m.ptx_equal]
    yield "–" if m.rival is None else f"{m.rival[1]:.1f} {m.rival[0]} ({m.rival_ratio:.2f})"
    met = {None: "", True: ", met", False: ", missed"}[m.goal_met]
    yield "–" if m.goal is None else f"{m.goal}{met}"


def _tile(tile: Any) -> str:
    return f"{tile.m}×{tile.n}×{tile.k}, {tile.warps}, {tile.stages}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
