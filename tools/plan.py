"""`angelforge plan`: from a checkpoint's configuration and headers alone, what fits on a target and what limits it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import click

from angelforge.engines.built import built_activations
from angelforge.engines.limits import BuildOptions, draft_depth
from angelforge.engines.planner import PlanRequest
from angelforge.engines.planner import plan as make_plan
from angelforge.errors import AngelForgeError, UsageError
from angelforge.exporter.draft_layout import require_stackable
from angelforge.machine import gpus, memory
from angelforge.precision import Precision
from angelforge.targets import TARGETS, Target, get_target
from angelforge.tools.options import NUMBER, json_option
from angelforge.tools.output import print_json
from angelforge.tools.plan_model import Model, read_model
from angelforge.tools.plan_operators import check_operators
from angelforge.tools.plan_report import print_comparison, print_model, print_plan


def _ranks(context: click.Context, parameter: click.Parameter, value: str) -> list[int]:
    words = [word.strip() for word in value.split(",")]
    if not all(word.isascii() and word.isdecimal() and len(word) < 10 for word in words):
        raise UsageError(f"--tensor-parallel is {value!r}, but numbers of devices are needed, such as 2 or 1,2,4,8.")
    return [int(word) for word in words]


@click.command()
@click.argument("checkpoint")
@click.option("--target", help=f"One of {', '.join(TARGETS)}; without it all are compared, but `cuda`.")
@click.option("--precision", type=click.Choice([p.value for p in Precision]), help="Default: the checkpoint's own.")
@click.option(
    "--tensor-parallel",
    metavar="N[,N…]",
    default="1",
    callback=_ranks,
    show_default=True,
    help="Devices that share the model; several numbers are compared.",
)
@click.option("--max-context", type=int, help="Positions of the longest sequence. Default: all the model covers.")
@click.option("--rope-scaling", metavar="yarn:FACTOR", help="Stretch the context with YaRN, for example yarn:4.")
@click.option("--layers", type=int, help="Only the first N layers.")
@click.option("--draft", help="Folder or Hub id of an EAGLE3 draft that goes with it.")
@click.option("--max-tokens", default=8192, show_default=True, help="Tokens in one step.")
@click.option("--max-batch", default=32, show_default=True, help="Sequences in one step.")
@click.option("--memory-gb", type=NUMBER, help="Memory of one device in GB (10⁹ bytes), instead of the target's.")
@json_option
def plan(
    checkpoint: str,
    target: str | None,
    precision: str | None,
    rope_scaling: str | None,
    layers: int | None,
    draft: str | None,
    memory_gb: float | None,
    tensor_parallel: list[int],
    as_json: bool,
    **sizes: Any,
) -> None:
    """Say what a model needs, whether it fits on a target, and the physical limit of its decoding.

    CHECKPOINT is a folder, a config.json, a bundle or a Hub id (of which only the configuration is downloaded). No
    weights are read; a folder's headers are checked against its configuration, and the kernels are asked whether they
    serve its sizes. Of a bundle with a built engine the activations are those that TensorRT told.

    \b
    Example:
      angelforge plan AntAngelMed-FP8 --target h20 --tensor-parallel 2 --rope-scaling yarn:4
    """
    model = read_model(checkpoint, layers, rope_scaling, draft)
    chosen = Precision(precision) if precision else model.precision
    if model.draft is not None and model.bundle is None:  # in a bundle they stand together already
        require_stackable(model.draft, chosen)
    if sizes["max_context"] is None:
        sizes["max_context"] = model.max_context
    requests = [
        _request(model, chosen, t, memory_bytes=_memory_bytes(t, memory_gb), tensor_parallel=ranks, **sizes)
        for ranks in tensor_parallel
        for t in ([get_target(target)] if target else _comparable(ranks))
    ]
    plans = [make_plan(request) for request in requests]
    for note in _operator_notes(requests):
        click.echo(f"note: {note}", err=True)
    if as_json:
        print_json({"model": model.to_dict(), "plans": [item.to_dict() for item in plans]})
        return
    print_model(model)
    print_plan(plans[0]) if target and len(plans) == 1 else print_comparison(plans)


def _request(model: Model, precision: Precision, target: Target, **sizes: Any) -> PlanRequest:
    request = PlanRequest(model.config, precision, target, draft=model.draft, **sizes)
    if model.bundle is None or model.bundle.manifest.precision is not precision:
        return request
    depth = draft_depth(model.bundle, BuildOptions())
    built = built_activations(model.bundle, target, sizes | {"draft_depth": depth})
    return dataclasses.replace(request, activations=built)


def _operator_notes(requests: Sequence[PlanRequest]) -> list[str]:
    """What the kernels say of a model; what one target's cannot serve is an error, of several targets a note."""
    found: dict[str, list[str]] = {}
    for request in requests:
        try:
            note = check_operators(request)
        except AngelForgeError as error:
            if len(requests) == 1:
                raise
            note = str(error)
        if note is not None:
            found.setdefault(note, []).append(request.target.name)
    return [f"{', '.join(names)}: {note}" for note, names in found.items()]


def _comparable(ranks: int) -> list[Target]:
    return [
        target
        for target in TARGETS.values()
        if target.backend != "onnxruntime" or (target.device == "cpu" and ranks == 1)
    ]


def _memory_bytes(target: Target, asked: float | None) -> int | None:
    if asked is not None:
        if not 0 < asked < 1e6:
            raise UsageError(f"--memory-gb is {asked:g}, but a number of GB above 0 is needed.")
        return int(asked * 1e9)
    if target.memory_bytes is not None:
        return None
    if target.device != "cpu":
        sizes = [gpu.memory for gpu in gpus() if gpu.memory is not None]
        if not sizes:
            raise UsageError(
                f"Target {target.name} is any GPU, and none here tells its memory: give it with --memory-gb."
            )
        return sizes[0]
    found = memory()
    if found is None:
        raise UsageError("This machine does not tell its memory: give it with --memory-gb.")
    return found.total
