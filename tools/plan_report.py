"""How `angelforge plan` prints its answer for people."""

from __future__ import annotations

from collections.abc import Sequence

import click

from angelforge.engines.decode_limit import DecodeLimit
from angelforge.engines.footprint import Kind
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
    click.echo(f"\n{devices}, {plan.precision}")
    rows = [[x.kind.value, format_bytes(x.total), format_bytes(x.per_rank), _place(x.kind)] for x in plan.weights]
    rows.append(["all", format_bytes(plan.weights_total), format_bytes(plan.weights_per_rank), ""])
    columns = ["weights", "total", "a device", ""] if many else ["weights", "bytes"]
    print_table(columns, [row[: len(columns)] for row in rows])
    memory = [
        ["memory", _gb(plan.memory), ""],
        ["weights", _gb(plan.weights_per_rank), ""],
        ["activations", _gb(plan.reserve_activations), _activations(plan)],
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
            [str(x.batch), f"{x.context:,}", format_bytes(x.bytes_per_step), *[_sums(x)] * many, _limit(x)]
            for x in plan.limits
        ]
        columns = ["batch", "context", "bytes a step", *["sums over devices"] * many]
        print_table([*columns, "tokens/s at most, without a draft (nominal bandwidth)"], limits)
    click.echo(_verdict(plan))


def print_comparison(plans: Sequence[Plan]) -> None:
    """One row a target and number of devices."""
    several = max(p.tensor_parallel for p in plans) > 1
    rows = [
        [
            p.target,
            *[str(p.tensor_parallel)] * several,
            "yes" if p.fits else "no",
            _gb(p.memory),
            _gb(p.needed),
            f"{p.tokens:,}",
            *[_limit(p.limits[0]) if p.limits else "", _limit(p.limits[-1]) if p.limits else ""],
            *[_sums(p.limits[0]) if p.limits else "", _sums(p.limits[-1]) if p.limits else ""] * several,
            " or ".join(p.remedies),
        ]
        for p in plans
    ]
    columns = ["target", *["devices"] * several, "fits", "memory", "needed", "cache tokens"]
    columns += ["limit, batch 1", "limit, batch 32", *["sums, batch 1", "sums, batch 32"] * several, "what helps"]
    click.echo(f"\n{plans[0].precision}, context {plans[0].max_context:,} (bytes of one device)")
    print_table(columns, rows)
    told = "Limits are tokens/s of all sequences together at nominal bandwidth, without a draft."
    click.echo(f"{told} Details: --target NAME.")


def _place(kind: Kind) -> str:
    if kind.drafted:
        return "on the first device"
    return "split" if kind.split else "on every device"


def _limit(limit: DecodeLimit) -> str:
    return f"{limit.tokens_per_second:,.0f}"


def _sums(limit: DecodeLimit) -> str:
    """What devices tell each other in a step."""
    sent = limit.communication
    return f"{sent.seconds * 1e3:.2f} ms, {format_bytes(sent.nbytes)}" if sent.calls else "none"


def _cache(plan: Plan) -> str:
    per_token = format_bytes(plan.kv_bytes_per_token)
    return f"{plan.tokens:,} tokens in pages of {plan.page_size}, {per_token} a token ({plan.kv_dtype})"


def _activations(plan: Plan) -> str:
    return "as the built engine takes them" if plan.activations_known else "upper estimate of one step"


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
