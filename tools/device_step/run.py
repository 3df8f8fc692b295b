"""A run: every case that fits, its kernels launched in order; then the same through TensorRT where there is one."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timezone

import torch

from angelforge.errors import AngelForgeError
from angelforge.plugins.compile import COMPILE_ERRORS
from angelforge.plugins.tensorrt.gpu import GpuFacts
from angelforge.tools.device_step.measure import measure_case
from angelforge.tools.device_step.memory import Subject, fit
from angelforge.tools.device_step.model import DeviceModel
from angelforge.tools.device_step.report import Report, make_row
from angelforge.tools.device_step.sequences import Case
from angelforge.tools.device_step.through_tensorrt import measure_through_tensorrt
from angelforge.tools.kernel_bench.measure import Machine
from angelforge.tools.kernel_bench.run import versions

Say = Callable[[str], None]


def run_kernels(
    machine: Machine, subject: Subject, all_layers: int, cases: Sequence[Case], rounds: int, say: Say
) -> Report:
    """Measures the cases that fit the GPU.

    Raises:
        AngelForgeError: none fits.
    """
    fitting = fit(subject, cases, free_bytes())
    needed = subject.needed_bytes(fitting.cases)
    say(f"Making random weights; with pool and buffers {needed / 1e9:.1f} GB …")
    try:
        model = DeviceModel(subject, fitting.cases, machine.gpu, machine.device)
    except torch.cuda.OutOfMemoryError as error:
        raise AngelForgeError(
            f"The GPU's memory did not suffice for the {needed / 1e9:.1f} GB that were counted: does another process "
            "use it? --layers or fewer sequences need less."
        ) from error
    rows, failed = [], []
    for case in fitting.cases:
        say(f"{case}: compiling, then {rounds} steps …")
        try:
            rows.append(make_row(subject, all_layers, machine, measure_case(model, case, rounds)))
        except COMPILE_ERRORS as error:  # a CUDA error among them: the context may be of no use any more
            failed.append(f"{case}: {_first_line(error)}; the run ends here")
            break
        say(f"{case}: {rows[-1].figures.timing.median / 1000:.3f} ms")
    return Report(
        machine=machine,
        subject=subject,
        all_layers=all_layers,
        launches=model.graph.launches,
        launches_by_layer=model.graph.launches_by_layer,
        rows=rows,
        left_out=fitting.left_out,
        failed=failed,
        notes=(),
        versions=versions(),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def add_tensorrt(report: Report, facts: GpuFacts, rounds: int, say: Say) -> Report:
    """The report with the same cases through TensorRT, or with a sentence that says why not."""
    measured = [row.figures for row in report.rows]
    if report.failed or not measured:
        return replace(report, notes=("Not tried through TensorRT: the kernels alone have failed.",))
    torch.cuda.empty_cache()
    try:
        found = measure_through_tensorrt(facts, report.machine, report.subject, measured, rounds, say)
    except (AngelForgeError, RuntimeError, OSError) as error:  # the kernels' figures stand, whatever happens here
        return replace(report, notes=(f"Not through TensorRT: {_first_line(error)}",))
    rows = [make_row(report.subject, report.all_layers, report.machine, figures) for figures in found]
    return replace(report, rows=[*report.rows, *rows])


def free_bytes() -> int:
    """Of the GPU's memory, what torch has cached given back first."""
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info()[0])


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
