"""Other engines' kernels beside ours: compared first, then timed in the same way on the same sets of inputs.

This comes after all of our own measurements, so that a kernel that breaks the GPU's context costs no figure of ours.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from angelforge.tools.kernel_bench.capture import CaptureError
from angelforge.tools.kernel_bench.compare import Verdict, compare
from angelforge.tools.kernel_bench.execution import execute
from angelforge.tools.kernel_bench.failures import LAUNCH_ERRORS, answers, reason
from angelforge.tools.kernel_bench.inputs import make_inputs
from angelforge.tools.kernel_bench.measure import Machine, Measurement, rotation
from angelforge.tools.kernel_bench.rivals.comparison import Beside, Comparison
from angelforge.tools.kernel_bench.rivals.deepgemm import DEEPGEMM
from angelforge.tools.kernel_bench.rivals.flashinfer import FLASHINFER
from angelforge.tools.kernel_bench.rivals.layouts import in_order_of
from angelforge.tools.kernel_bench.rivals.rival import Engine, Prepare, Rival, Shared
from angelforge.tools.kernel_bench.rivals.vllm import VLLM
from angelforge.tools.kernel_bench.timing import time_calls
from angelforge.tools.kernel_bench.work import Work

ENGINES = (DEEPGEMM, VLLM, FLASHINFER)
ALLOWED = 2.0  # times our own limit: both sides round, and others round to bf16 in between


@dataclass(frozen=True)
class Loaded:
    """An engine that could be imported."""

    engine: Engine
    module: Any


class Rivals:
    """The engines of a run: those that load, and what is said of the others."""

    def __init__(self, engines: Sequence[Engine] = ENGINES) -> None:
        self.loaded: list[Loaded] = []
        self.absent: list[str] = []  # not installed
        self.broken: list[str] = []  # installed, but not importable
        self.lost = ""  # the kernel after which the GPU did not answer any more
        for engine in engines:
            if engine.installed() is None:
                self.absent.append(engine.name)
                continue
            try:
                self.loaded.append(Loaded(engine, engine.load()))
            except LAUNCH_ERRORS as error:
                self.broken.append(f"{engine.name} is not run: it does not load ({reason(error)})")

    @property
    def versions(self) -> dict[str, str]:
        """Of the engines that are measured."""
        return {one.engine.name: str(getattr(one.module, "__version__", "?")) for one in self.loaded}

    def all_beside(
        self,
        measurements: Sequence[Measurement],
        machine: Machine,
        deadline: Callable[[], bool],
        seed: int,
        say: Callable[[str], None] = lambda text: None,
        save: Callable[[Comparison], None] = lambda found: None,
    ) -> Comparison:
        """Rows for all calls that there is time for; `say` is told of each, `save` given all after each call."""
        rows: list[Beside] = []
        left = []
        for measured in measurements:
            if not self._kernels(measured.work):
                continue
            if deadline():
                left.append(measured.work.name)
                continue
            known = len(rows)
            self._beside(measured, machine, seed, rows)
            rows[known:] = [_with_merge(row, measurements) for row in rows[known:]]
            for row in rows[known:]:
                figure = row.problem or f"{row.microseconds:.1f} µs, ours {row.ours:.1f}"
                say(f"{row.work.name}, {row.engine} {row.kernel}: {figure}")
            save(self._comparison(rows, left))
        return self._comparison(rows, left)

    def _comparison(self, rows: Sequence[Beside], left: Sequence[str]) -> Comparison:
        return Comparison(rows, self.versions, self.absent, self.broken, self.lost, left)

    def _beside(self, measured: Measurement, machine: Machine, seed: int, rows: list[Beside]) -> None:
        """Appends a row for every kernel that these engines have for the call."""
        work, found = measured.work, self._kernels(measured.work)
        if not found or self.lost:
            return
        try:
            inputs = make_inputs(work, seed, machine.device)
            ours = execute(work, inputs, measured.tile, machine.gpu)
            sets = rotation(work, inputs, measured.cost, seed)
        except LAUNCH_ERRORS as error:  # too little memory beside what engines hold, say
            problem = f"not run: its inputs could not be made ({reason(error)})"
            rows += [Beside(work, one.engine.name, kernel.__name__, "", measured.timing.median, problem=problem)
                     for one, kernel in found]  # fmt: skip
            self._look(machine, "inputs", work)
            return
        shared = Shared({})
        for one, prepare in found:
            rows.append(_row(one, prepare, measured, sets, ours, shared))
            if rows[-1].problem:
                self._look(machine, f"{one.engine.name} {rows[-1].kernel}", work)
            if self.lost:
                return

    def _look(self, machine: Machine, what: str, work: Work) -> None:
        if not answers(machine.device):
            self.lost = f"{what} at {work.name}"

    def _kernels(self, work: Work) -> list[tuple[Loaded, Prepare]]:
        name = work.operator.name
        return [(one, prepare) for one in self.loaded for prepare in one.engine.kernels.get(name, ())]


def _row(
    one: Loaded, prepare: Prepare, measured: Measurement, sets: Sequence[Any], ours: Any, shared: Shared
) -> Beside:
    work, name, note = measured.work, prepare.__name__, ""
    ports = [port.name for port in work.operator.inputs]
    said: dict[str, Any] = {"work": work, "engine": one.engine.name, "ours": measured.timing.median}
    try:
        named = [dict(zip(ports, inputs, strict=True)) for inputs in sets]
        first = prepare(one.module, work, named[0], shared)
        name, note = first.name, first.note
        first.call()
        verdict = difference(work, sets[0], ours, first)
        if not verdict.ok:
            problem = f"differs: {verdict.output} by {verdict.error:.2g}, limit {verdict.limit:g}"
            return Beside(**said, kernel=name, note=note, difference=verdict, problem=problem)
        others: list[Callable[[], None]] = [prepare(one.module, work, i, shared).call for i in named[1:]]
        return Beside(**said, kernel=name, note=note, microseconds=time_calls([first.call, *others]).median,
                      difference=verdict)  # fmt: skip
    except LAUNCH_ERRORS as error:
        uncaptured = isinstance(error, CaptureError)
        return Beside(**said, kernel=name, note=note, problem=f"not run: {reason(error)}", uncaptured=uncaptured)


def difference(work: Work, inputs: Sequence[torch.Tensor], ours: Sequence[torch.Tensor], rival: Rival) -> Verdict:
    """How far our outputs are from the rival's; what it has no output for counts as equal."""
    theirs = list(rival.outputs())
    if work.operator.name == "MoERoute" and theirs[0] is not None and theirs[1] is not None:
        theirs[:2] = in_order_of(ours[0], theirs[0], theirs[1])
    wanted = [own if other is None else other for own, other in zip(ours, theirs, strict=False)]
    verdict = compare(work.operator, inputs, work.attributes, ours, wanted)
    return Verdict(verdict.error, ALLOWED * verdict.limit, verdict.output)


def _with_merge(row: Beside, measurements: Sequence[Measurement]) -> Beside:
    """Attention of others joins its parts itself: ours then counts with AttentionMerge of the same step."""
    if row.work.operator.name != "PagedAttention":
        return row
    merges = [m for m in measurements if m.work.operator.name == "AttentionMerge" and m.work.label == row.work.label]
    if not merges:
        return replace(row, note=f"{row.note}, ours without")
    return replace(row, ours=row.ours + merges[0].timing.median, note=f"{row.note}, ours with AttentionMerge")
