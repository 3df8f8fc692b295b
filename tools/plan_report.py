"""How `angelforge plan` prints its answer for people."""

from __future__ import annotations

from collections.abc import Sequence

import click

from angelforge.config import ModelConfig
from angelforge.engines.planner import Plan
from angelforge.tools.output import format_bytes, print_table


def print_model(
    source: str,
    config: ModelConfig,
    parameters: int,
    tensors: int | None,
    nbytes: int | None,
    notes: Sequence[str],
) -> None:
    """What was read, and what a user should know about it."""
    click.echo(f"{source}: {_parameters(parameters)} parameters, {config.num_hidden_layers} layers")
    if tensors is None or nbytes is None:
        click.echo("Only the configuration was read: no weights are there.")
    else:
        click.echo(f"{tensors:,} tensors, {format_bytes(nbytes)}: all headers fit the configuration.")
    for note in notes:
        click.echo(f"note: {note}")


def print_plan(plan: Plan) -> None:
    """One target in full: weights, memory, cache, limits, verdict."""
    devices = f"{plan.tensor_parallel} × {plan.target}" if plan.tensor_parallel > 1 else plan.target
    many = plan.tensor_parallel > 1
    place = {True: "split", False: "on every device"}
    rows = [
        [item.kind.value, format_bytes(item.total), format_bytes(item.per_rank), place[item.kind.split] if many else ""]
        for item in plan.weights
    ]
    rows.append(["all", format_bytes(plan.weights_total), format_bytes(plan.weights_per_rank), ""])
    print_table(["weights", "total", "a device", ""], rows, f"\n{devices}, {plan.precision}")
    step = plan.reserve_activations
    memory = [
        ["memory", format_bytes(plan.memory), ""],
        ["weights", format_bytes(plan.weights_per_rank), ""],
        ["activations", format_bytes(step), "upper estimate of one step"],
        ["driver and engine", format_bytes(plan.reserve_device), "reserve"],
        ["left for the cache", format_bytes(plan.left), _cache(plan)],
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
        print_table(["batch", "context", "bytes a step", "tokens/s at most (nominal bandwidth)"], limits)
    click.echo(_verdict(plan))


def print_comparison(plans: Sequence[Plan]) -> None:
    """One row a target."""
    rows = [
        [
            p.target,
            "yes" if p.fits else "no",
            format_bytes(p.memory),
            format_bytes(p.needed),
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
    print_table(columns, rows, f"\n{first.precision}, context {first.max_context:,}{ranks} (bytes of one device)")
    click.echo("Limits are tokens/s of all sequences together at nominal bandwidth. Details: --target NAME.")


def _cache(plan: Plan) -> str:
    per_token = format_bytes(plan.kv_bytes_per_token)
    return f"{plan.tokens:,} tokens in pages of {plan.page_size}, {per_token} a token ({plan.kv_dtype})"


def _sequences(plan: Plan, count: int | None) -> str:
    return f"{count:,}" if count is not None else f"longer than the context of {plan.max_context:,}"


def _verdict(plan: Plan) -> str:
    if plan.fits:
        return (
            f"It fits: {format_bytes(plan.needed)} of {format_bytes(plan.memory)} for one sequence, the rest for more."
        )
    lines = [f"It does not fit. {plan.problem}"]
    lines += [f"  fits with {remedy}" for remedy in plan.remedies]
    return "\n".join(lines if plan.remedies else [*lines, "  No other option or target that AngelForge knows helps."])


def _parameters(count: int) -> str:
    return f"{count / 1e9:.1f} B" if count >= 1e8 else f"{count / 1e6:.2f} M"
