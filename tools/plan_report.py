"""How `angelforge plan` prints its answer for people."""

from __future__ import annotations

from collections.abc import Sequence

import click

from angelforge.engines.planner import Plan
from angelforge.tools.output import format_bytes, print_table
from angelforge.tools.plan_model import Model


def print_model(model: Model) -> None:
    """What was read, and what a user should know about it."""
    click.echo(f"{model.source}: {_parameters(model.parameters)} parameters, {model.config.num_hidden_layers} layers")
    if model.tensors is None or model.nbytes is None:
        click.echo("Only the configuration was read: no weights are there.")
    else:
        click.echo(f"{model.tensors:,} tensors, {format_bytes(model.nbytes)}: all headers fit the configuration.")
    for note in model.notes:
        click.echo(f"note: {note}")


def print_plan(plan: Plan) -> None:
    """One target in full: weights, memory, cache, limits, verdict."""
    devices = f"{plan.tensor_parallel} × {plan.target}" if plan.tensor_parallel > 1 else plan.target
    many = plan.tensor_parallel > 1
    place = {True: "split", False: "on every device"}
    click.echo(f"\n{devices}, {plan.precision}")
    rows = [[x.kind.value, format_bytes(x.total), format_bytes(x.per_rank), place[x.kind.split]] for x in plan.weights]
    rows.append(["all", format_bytes(plan.weights_total), format_bytes(plan.weights_per_rank), ""])
    columns = ["weights", "total", "a device", ""] if many else ["weights", "bytes"]
    print_table(columns, [row[: len(columns)] for row in rows])
    memory = [
        ["memory", _gb(plan.memory), ""],
        ["weights", _gb(plan.weights_per_rank), ""],
        ["activations", _gb(plan.reserve_activations), "upper estimate of one step"],
        ["driver and engine", _gb(plan.reserve_device), "reserve"],
        ["left for the cache", _gb(plan.left), _cache(plan)],
    ]
    print_table(["a device", "bytes", ""], memory)
    print_table(
        ["context", "sequences at once"],
        [[f"{c.context:,}", _sequences(plan, c.sequences)] for c in plan.capacities],
    )
    if plan.limits:
        limits = [
            [str(x.batch), f"{x.context:,}", format_bytes(x.bytes_per_step), f"{x.tokens_per_second:,.0f}"]
            for x in plan.limits
        ]
        reduced = " and 10 µs an all-reduce" if many else ""
        print_table(["batch", "context", "bytes a step", f"tokens/s at most (nominal bandwidth{reduced})"], limits)
    click.echo(_verdict(plan))


def print_comparison(plans: Sequence[Plan]) -> None:
    """One row a target."""
    rows = [
        [
            p.target,
            "yes" if p.fits else "no",
            _gb(p.memory),
            _gb(p.needed),
            f"{p.tokens:,}",
            f"{p.limits[0].tokens_per_second:,.0f}" if p.limits else "",
            f"{p.limits[-1].tokens_per_second:,.0f}" if p.limits else "",
            " or ".join(p.remedies),
        ]
        for p in plans
    ]
    first = plans[0]
    columns = ["target", "fits", "memory", "needed", "cache tokens", "limit, batch 1", "limit, batch 32", "what helps"]
    ranks = f", {first.tensor_parallel} devices" if first.tensor_parallel > 1 else ""
    click.echo(f"\n{first.precision}, context {first.max_context:,}{ranks} (bytes of one device)")
    print_table(columns, rows)
    click.echo("Limits are tokens/s of all sequences together at nominal bandwidth. Details: --target NAME.")


def _cache(plan: Plan) -> str:
    per_token = format_bytes(plan.kv_bytes_per_token)
    return f"{plan.tokens:,} tokens in pages of {plan.page_size}, {per_token} a token ({plan.kv_dtype})"


def _sequences(plan: Plan, count: int | None) -> str:
    return f"{count:,}" if count is not None else f"longer than the context of {plan.max_context:,}"


def _verdict(plan: Plan) -> str:
    if plan.fits:
        return f"It fits: {_gb(plan.needed)} of {_gb(plan.memory)} with one sequence, the rest is for more."
    lines = [f"It does not fit. {plan.problem}"]
    lines += [f"  fits with {remedy}" for remedy in plan.remedies]
    return "\n".join(lines if plan.remedies else [*lines, "  No other option or target that AngelForge knows helps."])


def _parameters(count: int) -> str:
    return f"{count / 1e9:.1f} B" if count >= 1e8 else f"{count / 1e6:.2f} M"


def _gb(count: int) -> str:
    """Large amounts with one decimal: whether a model fits is a matter of single GB."""
    return f"{count / 1e9:,.1f} GB" if abs(count) >= 1e9 else format_bytes(count)
