"""What a draft did, in a line for people."""

from __future__ import annotations

import click

from angelforge.errors import UsageError
from angelforge.runtime.depth import Depth
from angelforge.runtime.tally import SpeculationReport
from angelforge.tools.output import format_seconds


def _depth(context: click.Context, parameter: click.Parameter, value: str) -> Depth:
    if value == "auto":
        return "auto"
    if value.isascii() and value.isdigit() and len(value) < 9:
        return int(value)
    raise UsageError(f"--speculate is {value!r}, but a number of tokens or auto is needed.")


#: The parameter is called `speculate` and is a number or "auto".
speculate_option = click.option(
    "--speculate",
    metavar="N|auto",
    default="auto",
    show_default=True,
    callback=_depth,
    help="Tokens that the bundle's draft proposes at a time; 0: none; auto: as many as pay. The output stays the same.",
)


def describe(report: SpeculationReport) -> str:
    """Accepted length, acceptance by position, calls and times."""
    if report.accepted_length is None:
        return f"draft: nothing proposed in {report.target_calls} target calls"
    shares = ", ".join(f"{share:.0%}" for share in report.acceptance_by_position)
    return (
        f"draft: {report.accepted_length:.2f} tokens a round in {report.rounds} rounds, accepted by position {shares}; "
        f"{report.target_calls} target calls; draft {format_seconds(report.draft_seconds)}, "
        f"checks {format_seconds(report.verify_seconds)}"
    )
