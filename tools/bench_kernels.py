"""`angelforge bench kernels`: the plugins' kernels on this machine's GPU, right and how fast."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from angelforge.errors import AngelForgeError, UsageError
from angelforge.plugins.registry import OPERATORS
from angelforge.tools.gpu_needed import require_gpu
from angelforge.tools.options import NUMBER, require_writable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from angelforge.plugins.tuning import Row
    from angelforge.tools.kernel_bench.measure import Machine
    from angelforge.tools.kernel_bench.report import Report
    from angelforge.tools.kernel_bench.run import Deadline

SECONDS = 420.0


@click.command()
@click.option("--operator", "operators", multiple=True, help="This operator only; may be given several times.")
@click.option("--tune", is_flag=True, help="Try tiles near the default ones and write the best to --tuning.")
@click.option("--tuning", type=click.Path(path_type=Path), default=Path("tuning.json"), show_default=True,
              help="Where --tune writes; rows that the file has of other tiles stay.")  # fmt: skip
@click.option(
    "--seconds",
    type=NUMBER,
    default=SECONDS,
    show_default=True,
    help="After so long, what is left is skipped and named.",
)
@click.option("--seed", default=1, show_default=True, help="Of the random inputs.")
@click.option("--own-only", is_flag=True, help="Leave out other engines' kernels, though they are installed.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write all figures to this file.")
def kernels(
    operators: tuple[str, ...],
    tune: bool,
    tuning: Path,
    seconds: float,
    seed: int,
    own_only: bool,
    json_file: Path | None,
) -> None:
    """Check every kernel against its definition and measure it at AntAngelMed's sizes. Needs a CUDA GPU.

    Then the kernels of DeepGEMM, vLLM and FlashInfer on the same inputs, where they are installed. Progress goes to
    standard error, the tables to standard output; exit code 1 if any result of ours is wrong.

    \b
    Example:
      angelforge bench kernels --json kernels.json
    """
    unknown = [name for name in operators if name not in OPERATORS]
    if unknown:
        raise UsageError(f"There is no operator {unknown[0]!r}; there are {', '.join(OPERATORS)}.")
    _check_options(seconds, seed, json_file, tuning if tune else None)
    facts = require_gpu("bench kernels")
    from angelforge.tools.kernel_bench.run import Deadline, compare_engines, find_machine, run

    deadline = Deadline(seconds)
    machine = find_machine(facts)
    if tune:
        _tune(machine, operators, deadline, tuning)
        return
    report = run(machine, operators, deadline, seed, _say, lambda known: _save(known, json_file))
    _save(report, json_file)  # and shown, before foreign code runs that may end the process
    click.echo(report.markdown())
    if not own_only:
        others = compare_engines(report.measurements, machine, deadline, seed, _say,
                                 lambda found: _save(replace(report, others=found), json_file))  # fmt: skip
        _save(replace(report, others=others), json_file)
        click.echo("\n".join(others.markdown()))
    if report.problems:
        raise AngelForgeError(f"{len(report.problems)} results are wrong; they stand below the first table.")


def _check_options(seconds: float, seed: int, json_file: Path | None, tuning: Path | None) -> None:
    if not seconds > 0:  # nor if it is no number
        raise UsageError(f"--seconds is {seconds:g}, but a time above 0 is needed.")
    if not 0 <= seed < 2**63:
        raise UsageError(f"--seed is {seed}, but a number from 0 to 2⁶³ − 1 is needed.")
    require_writable("--json", json_file)
    require_writable("--tuning", tuning)


def _save(report: Report, path: Path | None) -> None:
    if path is not None:
        from angelforge.atomic import write_atomic

        write_atomic(path, json.dumps(report.to_dict(), indent=1, ensure_ascii=False) + "\n")


def _tune(machine: Machine, operators: tuple[str, ...], deadline: Deadline, path: Path) -> None:
    from angelforge.plugins.tuning import read_rows, write_rows
    from angelforge.tools.kernel_bench.run import full_config
    from angelforge.tools.kernel_bench.tuner import tasks, tune

    before = {row.key(): row for row in (read_rows(path) if path.exists() else ())}

    def save(rows: Sequence[Row]) -> int:
        merged = {**before, **{row.key(): row for row in rows}}
        write_rows(path, merged.values(), "Measured by `angelforge bench kernels --tune`.")
        return len(merged)

    rows, left = tune(tasks(full_config(), operators), machine, deadline.over, _say, save)
    count = save(rows)
    _say(f"{path} has {count} rows, {len(rows)} of them new; {len(left)} of the tasks were not done.")


def _say(text: str) -> None:
    click.echo(text, err=True)
