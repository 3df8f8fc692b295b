"""A run: every case that fits, its kernels launched in order; then the same through TensorRT where there is one.

What is known is handed to `save` after every case: a run that is killed keeps the figures that it has.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timezone

import torch

from angelforge.errors import AngelForgeError
from angelforge.plugins.tensorrt.gpu import GpuFacts
from angelforge.tools.device_step.measure import Figures, measure_case
from angelforge.tools.device_step.memory import Subject, fit
from angelforge.tools.device_step.model import DeviceModel
from angelforge.tools.device_step.report import Report, make_row, table_line
from angelforge.tools.device_step.sequences import Case
from angelforge.tools.device_step.through_tensorrt import measure_through_tensorrt
from angelforge.tools.kernel_bench.failures import LAUNCH_ERRORS, answers, reason
from angelforge.tools.kernel_bench.measure import Machine
from angelforge.tools.kernel_bench.run import versions

Say = Callable[[str], None]
Save = Callable[[Report], None]


def run_kernels(
    machine: Machine, subject: Subject, all_layers: int, cases: Sequence[Case], rounds: int, say: Say, save: Save
) -> Report:
    """Measures the cases that fit the GPU; one that fails does not end the run while the GPU answers.

    Raises:
        AngelForgeError: none fits, or the weights cannot be made.
    """
    fitting = fit(subject, cases, free_bytes())
    model = _model(machine, subject, fitting.cases, say)
    report = Report(
        machine=machine,
        subject=subject,
        all_layers=all_layers,
        launches=model.graph.launches,
        launches_by_layer=model.graph.launches_by_layer,
        rows=(),
        left_out=fitting.left_out,
        failed=(),
        notes=(),
        versions=versions(),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    for case in fitting.cases:
        say(f"{case}: {rounds} times some steps …")
        try:
            report = _with_row(report, measure_case(model, case, rounds), say)
        except torch.cuda.OutOfMemoryError:
            report = replace(report, left_out=[*report.left_out, (case, "ran out of the GPU's memory on the way")])
        except LAUNCH_ERRORS as error:
            report = replace(report, failed=[*report.failed, f"{case}: {reason(error)}"])
        alive = answers(machine.device)
        if not alive:
            report = replace(report, failed=[*report.failed, f"the GPU does not answer after {case}; the run ends"])
        save(report)
        if not alive:
            break
    return report


def _model(machine: Machine, subject: Subject, cases: Sequence[Case], say: Say) -> DeviceModel:
    needed = subject.needed_bytes(cases)
    say(f"Making random weights; with pool and buffers {needed / 1e9:.1f} GB …")
    try:
        return DeviceModel(subject, cases, machine.gpu, machine.device)
    except torch.cuda.OutOfMemoryError as error:
        raise AngelForgeError(
            f"The GPU's memory did not suffice for the {needed / 1e9:.1f} GB that were counted: does another process "
            "use it? --layers or fewer sequences need less."
        ) from error
    except LAUNCH_ERRORS as error:
        raise AngelForgeError(f"The random weights could not be made: {reason(error)}.") from error


def add_tensorrt(report: Report, facts: GpuFacts, rounds: int, say: Say, save: Save) -> Report:
    """The report with the same cases through TensorRT, or with a sentence that says why not."""
    measured = [row.figures for row in report.rows]
    if report.failed or not measured:
        return replace(report, notes=("Not tried through TensorRT: the kernels alone have failed.",))
    try:
        torch.cuda.empty_cache()
        for figures in measure_through_tensorrt(facts, report.machine, report.subject, measured, rounds, say):
            report = _with_row(report, figures, say)
            save(report)
    except LAUNCH_ERRORS as error:  # the kernels' figures stand, whatever happens here
        return replace(report, notes=(*report.notes, f"Not through TensorRT: {reason(error)}"))
    return report


def free_bytes() -> int:
    """Of the GPU's memory, what torch has cached given back first."""
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info()[0])


def _with_row(report: Report, figures: Figures, say: Say) -> Report:
    row = make_row(report.subject, report.all_layers, report.machine, figures)
    say(table_line(row))
    return replace(report, rows=[*report.rows, row])
