"""`angelforge bench device`: the decoding step of a model's real shape on this machine's GPU, with random weights."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from angelforge.errors import AngelForgeError, UsageError
from angelforge.tools.options import json_option, require_writable
from angelforge.tools.output import print_json

if TYPE_CHECKING:
    from angelforge.config import ModelConfig
    from angelforge.tools.device_step.report import Report

BATCHES, CONTEXTS = "1,32", "1024,131072"
SHAPE = "AntAngelMed"


@click.command()
@click.argument("source", default=SHAPE)
@click.option("--precision", type=click.Choice(["fp8", "bf16"]), default="fp8", show_default=True, help="Of weights.")
@click.option("--batch", "batches", default=BATCHES, show_default=True, help="Sequences that decode together.")
@click.option("--context", "contexts", default=CONTEXTS, show_default=True, help="Tokens that each of them holds.")
@click.option("--layers", type=int, help="Only the first N layers, for a GPU that cannot hold all.")
@click.option(
    "--rounds",
    type=click.IntRange(1, 1000),
    default=50,
    show_default=True,
    help="Groups of 8 steps, for the median.",
)
@click.option("--kernels-only", is_flag=True, help="Not through TensorRT, too, where it is installed.")
@click.option("--by-operator", is_flag=True, help="Time every operator by itself, too.")
@click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), default=1, show_default=True, help="Of weights, cache and tokens."
)
@click.option("--output", type=click.Path(path_type=Path), help="Write all figures to this file as JSON.")
@json_option
def device(
    source: str,
    precision: str,
    batches: str,
    contexts: str,
    layers: int | None,
    rounds: int,
    kernels_only: bool,
    by_operator: bool,
    seed: int,
    output: Path | None,
    as_json: bool,
) -> None:
    """Time a decoding step of SOURCE's shape beside what the memory's bandwidth allows. Needs a CUDA GPU.

    SOURCE is a config.json, a checkpoint, a bundle or a Hub id, by default AntAngelMed's shape; nothing is read of it
    but its configuration. Weights and cache are random and made on the GPU. The step's kernels are launched in the
    graph's order and captured in one CUDA graph; then the same through TensorRT, where it is installed, with an engine
    that is built now. Batches and contexts that do not fit the memory are left out by name.

    \b
    Example:
      angelforge bench device --batch 1,32 --context 1024,131072 --output device.json
    """
    from angelforge.precision import Precision
    from angelforge.tools.gpu_needed import require_gpu

    require_writable("--output", output)
    config = _config(source)
    chosen = config if layers is None else config.with_layers(layers)
    sizes = [(batch, context) for batch in _numbers("--batch", batches) for context in _numbers("--context", contexts)]
    facts = require_gpu("bench device")

    from angelforge.plugins.kernel import Gpu
    from angelforge.tools.device_step.memory import Subject
    from angelforge.tools.device_step.precompile import precompile
    from angelforge.tools.device_step.run import add_tensorrt, run_kernels
    from angelforge.tools.device_step.sequences import Case
    from angelforge.tools.kernel_bench.run import find_machine

    cases = [Case(batch, context) for batch, context in sizes]
    longest = max(context for _, context in sizes)
    subject = Subject(chosen, Precision(precision), longest, seed, by_operator)
    precompile(subject, cases, Gpu(facts.architecture, facts.sms), _say)
    save = partial(_write, output)
    report = run_kernels(find_machine(facts), subject, config.num_hidden_layers, cases, rounds, _say, save)
    if not kernels_only:
        report = add_tensorrt(report, facts, rounds, _say, save)
        save(report)
    if as_json:
        print_json(report.to_dict())
    else:
        click.echo(report.markdown())
    if report.problems:
        raise AngelForgeError(f"{len(report.problems)} results are wrong or missing: {report.problems[0]}.")


def _write(output: Path | None, report: Report) -> None:
    """After every case, whole each time: a run may be killed, and TensorRT may end the process."""
    if output is not None:
        from angelforge.atomic import write_atomic

        write_atomic(output, json.dumps(report.to_dict(), indent=1, ensure_ascii=False) + "\n")


def _config(source: str) -> ModelConfig:
    from angelforge.exporter.sources import require_exportable

    if source == SHAPE and not Path(source).exists():
        from angelforge.config import ModelConfig
        from angelforge.exporter.synthetic_config import FULL_CONFIG

        return ModelConfig.from_dict(FULL_CONFIG)
    from angelforge.tools.plan_model import read_model

    config = read_model(source, None, None).config
    require_exportable(config)
    return config


def _numbers(option: str, text: str) -> list[int]:
    """Different positive integers, in their order."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = [0]
    if min(found) < 1 or max(found) >= 2**31:
        raise UsageError(f"{option} is {text!r}, expected positive integers with commas between, as in {BATCHES}.")
    return list(dict.fromkeys(found))


def _say(text: str) -> None:
    click.echo(text, err=True)
