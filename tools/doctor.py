"""`angelforge doctor`: what this machine can do; for each gap what it prevents and how to close it."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import click

from angelforge import machine
from angelforge.tools import checks_hardware as hardware
from angelforge.tools import checks_software as software
from angelforge.tools.finding import Finding
from angelforge.tools.options import json_option
from angelforge.tools.output import print_json

LABELS = {"ok": ("ok", "green"), "missing": ("gap", "yellow"), "problem": ("problem", "red")}


def examine(folder: Path) -> list[Finding]:
    """Look at everything, in the order in which it is shown. `folder` is where bundles would be written."""
    slow = (software.check_onnxruntime, software.check_tensorrt, software.check_tensorrt_rtx)
    with ThreadPoolExecutor(len(slow)) as pool:  # each waits for a process of its own
        onnxruntime, tensorrt, tensorrt_rtx = (pool.submit(check) for check in slow)
        gpus = machine.gpus()
        return [
            software.check_python(),
            *software.check_packages(),
            software.check_one_onnxruntime(),
            onnxruntime.result(),
            hardware.check_gpu(gpus),
            *hardware.check_driver(gpus),
            tensorrt.result(),
            tensorrt_rtx.result(),
            *software.check_extras(),
            hardware.check_memory(machine.memory()),
            hardware.check_disk(folder),
            hardware.check_cores(machine.cores()),
        ]


def main_job_possible(findings: Sequence[Finding]) -> bool:
    """Whether export, `build --target cpu` and run can work here."""
    return all(finding.status == "ok" for finding in findings if finding.needed)


@click.command()
@click.option(
    "--folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=Path(),
    help="Where bundles would be written: its free space is looked at.  [default: the current folder]",
)
@click.option("--deep", is_flag=True, help="Also build and run small engines with TensorRT: minutes on a GPU.")
@json_option
def doctor(folder: Path, deep: bool, as_json: bool) -> None:
    """Say what this machine can do, what prevents the rest, and how to close each gap.

    Exit code 1 if a checkpoint can not be exported, built for the CPU and run here; gaps that only prevent more than
    that leave it 0.

    With --deep small engines are built with every TensorRT here, run on the GPU and compared with ONNX Runtime: what
    could not be tried where this project was written. Send the output back with --json.

    \b
    Example:
      angelforge doctor
      angelforge doctor --deep --json > report.json
    """
    findings = examine(folder)
    if deep:
        from angelforge.tools.deep import examine_deeply

        findings += examine_deeply(lambda name: click.echo(f"trying: {name}", err=True))
    possible = main_job_possible(findings)
    if as_json:
        print_json({"main_job_possible": possible, "findings": [asdict(finding) for finding in findings]})
    else:
        _print(findings)
        answer = "possible" if possible else "not possible, see what is marked above"
        click.echo(f"\n{software.MAIN_JOB} on this machine: {click.style(answer, bold=True)}")
    if not possible:
        raise click.exceptions.Exit(1)


def _print(findings: Sequence[Finding]) -> None:
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        label, colour = LABELS[finding.status]
        click.echo(f"{click.style(f'{label:8}', fg=colour)} {finding.name:{width}}  {finding.found}")
        for what, text in (("prevents", finding.prevents), ("fix", finding.fix)):
            if text:
                click.echo(f"{'':{width + 11}}{what}: {text}")
