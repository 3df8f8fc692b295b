"""`angelforge plan`: from a checkpoint's configuration and headers alone, what fits on a target and what limits it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from angelforge.checkpoint import Checkpoint
from angelforge.config import ModelConfig
from angelforge.engines.planner import PlanRequest
from angelforge.engines.planner import plan as make_plan
from angelforge.errors import UsageError
from angelforge.hub import CONFIG_FILES, locate
from angelforge.inventory import expected_tensors
from angelforge.precision import Precision
from angelforge.shards import INDEX, SINGLE
from angelforge.targets import TARGETS, Target, get_target
from angelforge.tools.machine import memory
from angelforge.tools.options import json_option
from angelforge.tools.output import print_json


@dataclass(frozen=True)
class Model:
    """What was read: configuration, parameters, and the checked headers if there were any."""

    source: str
    config: ModelConfig
    parameters: int
    notes: tuple[str, ...]
    tensors: int | None  # None if only the configuration was read
    nbytes: int | None

    def to_dict(self) -> dict[str, Any]:
        """All facts as JSON values."""
        facts = {"source": self.source, "parameters": self.parameters, "tensors": self.tensors, "bytes": self.nbytes}
        return {**facts, "notes": list(self.notes), "digest": self.config.digest(), "config": self.config.to_dict()}


@click.command()
@click.argument("checkpoint")
@click.option("--target", help=f"One of {', '.join(TARGETS)}; without it all are compared.")
@click.option("--precision", type=click.Choice([p.value for p in Precision]), help="Default: the checkpoint's own.")
@click.option("--tensor-parallel", default=1, show_default=True, help="Devices that share the model.")
@click.option("--max-context", type=int, help="Positions of the longest sequence. Default: all the model covers.")
@click.option("--rope-scaling", metavar="yarn:FACTOR", help="Stretch the context with YaRN, for example yarn:4.")
@click.option("--layers", type=int, help="Only the first N layers.")
@click.option("--max-tokens", default=8192, show_default=True, help="Tokens in one step.")
@click.option("--max-batch", default=32, show_default=True, help="Sequences in one step.")
@click.option("--memory-gb", type=float, help="Memory of one device in GB (10⁹ bytes), instead of the target's.")
@json_option
def plan(
    checkpoint: str,
    target: str | None,
    precision: str | None,
    rope_scaling: str | None,
    layers: int | None,
    memory_gb: float | None,
    as_json: bool,
    **sizes: Any,
) -> None:
    """Say what a model needs, whether it fits on a target, and the physical limit of its decoding.

    CHECKPOINT is a folder, a config.json or a Hub id (of which only the configuration is downloaded). No weights are
    read; a folder's headers are checked against its configuration.

    \b
    Example:
      angelforge plan AntAngelMed-FP8 --target h20 --tensor-parallel 2 --rope-scaling yarn:4
    """
    model = read_model(checkpoint, layers)
    config = model.config.with_rope_scaling(rope_scaling) if rope_scaling else model.config
    chosen = Precision(precision) if precision else natural_precision(config)
    sizes["max_context"] = sizes["max_context"] or config.max_context
    targets = [get_target(target)] if target else _comparable(sizes["tensor_parallel"])
    plans = [
        make_plan(PlanRequest(config, chosen, t, memory_bytes=_memory_bytes(t, memory_gb), **sizes)) for t in targets
    ]
    notes = (*model.notes, *config.notes[len(model.config.notes) :])
    if as_json:
        facts = {"model": {**model.to_dict(), "notes": list(notes)}}
        print_json(
            {**facts, "plan": plans[0].to_dict()} if target else {**facts, "plans": [p.to_dict() for p in plans]}
        )
        return
    from angelforge.tools.plan_report import print_comparison, print_model, print_plan

    print_model(model.source, config, model.parameters, model.tensors, model.nbytes, notes)
    print_plan(plans[0]) if target else print_comparison(plans)


def read_model(source: str, layers: int | None) -> Model:
    """Reads a configuration and, where a folder has weights, their headers; raises AngelForgeError if they do not fit."""
    path = Path(source)
    folder = path if path.is_file() else locate(source, CONFIG_FILES)
    if path.is_dir() and any((path / name).exists() for name in (INDEX, SINGLE)):
        checkpoint = Checkpoint.open(path, layers)
        checkpoint.check()
        config, notes = checkpoint.config, checkpoint.notes
        counts = (len(checkpoint.tensors) - len(checkpoint.dropped), checkpoint.nbytes)
    else:
        config = ModelConfig.load(folder)
        config = config if layers is None else config.with_layers(layers)
        notes, counts = config.notes, (None, None)
    shapes = (item.shape for name, item in expected_tensors(config).items() if not name.endswith("_scale_inv"))
    return Model(source, config, sum(math.prod(shape) for shape in shapes), notes, *counts)


def natural_precision(config: ModelConfig) -> Precision:
    """The precision that keeps a checkpoint's own numbers: FP8 as it is, f32 as f32, anything else as bf16."""
    if config.quantization is not None:
        return Precision.FP8
    return Precision.FP32 if config.torch_dtype == "float32" else Precision.BF16


def _comparable(ranks: int) -> list[Target]:
    return [target for target in TARGETS.values() if ranks == 1 or target.backend != "onnxruntime"]


def _memory_bytes(target: Target, asked: float | None) -> int | None:
    if asked is not None:
        if not 0 < asked < 1e6:
            raise UsageError(f"--memory-gb is {asked:g}, but a number of GB above 0 is needed.")
        return int(asked * 1e9)
    if target.memory_bytes is not None:
        return None
    found = memory()
    if found is None:
        raise UsageError("This machine does not tell its memory: give it with --memory-gb.")
    return found.total
