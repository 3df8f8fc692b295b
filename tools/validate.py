"""`angelforge validate`: is what was compiled the model? Down to the first wrong tensor."""

from __future__ import annotations

from pathlib import Path

import click

from angelforge.bundle import FILE
from angelforge.errors import AngelForgeError, UsageError
from angelforge.tools.options import json_option, require_writable
from angelforge.tools.output import print_json, total_progress
from angelforge.tools.validate_data import DataOptions
from angelforge.tools.validate_options import (
    refuse_for_checkpoint,
    refuse_for_draft,
    refuse_for_study,
    refuse_other_tokens,
)


@click.command()
@click.argument("subject", metavar="BUNDLE", type=click.Path(path_type=Path))
@click.option("--engine", default="cpu", show_default=True, help="A target's engine, `kernels`, or `cuda`.")
@click.option(
    "--reference",
    metavar="REF",
    help="Also numpy:CHECKPOINT (the draft's with --draft), transformers:CHECKPOINT or MODULE:FUNCTION.",
)
@click.option("--against", metavar="OTHER", help="Precision study: fp32, another bundle, or a checkpoint.")
@click.option("--layer-by-layer", "by_layer", is_flag=True, help="Run each layer with the judge's inputs.")
@click.option("--operator-by-operator", "by_operator", is_flag=True, help="Run each operator with the judge's inputs.")
@click.option("--draft", is_flag=True, help="The engine of the bundle's draft instead, operator by operator.")
@click.option("--layers", metavar="N,N,…", help="Only these layers; of a CHECKPOINT they need no export.")
@click.option("--tokens", type=click.Path(path_type=Path), help="A JSON file: lists of token ids.")
@click.option("--dialogues", is_flag=True, help="The demo's conversations.")
@click.option("--random", "count", type=click.IntRange(1, 64), help="So many random sequences. [default: 2]")
@click.option("--length", type=click.IntRange(1), help="About the length of random ones. [default: 96]")
@click.option("--chunk", type=click.IntRange(1), default=40, show_default=True, help="Most tokens of one packed call.")
@click.option("--padding", type=click.IntRange(0), default=3, show_default=True, help="Padding rows of each call.")
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of random tokens and the order of pages."
)
@click.option("--html", metavar="FILE", type=click.Path(path_type=Path), help="Write a page with plots, too.")
@json_option
def validate(
    subject: Path,
    engine: str,
    reference: str | None,
    against: str | None,
    by_layer: bool,
    by_operator: bool,
    draft: bool,
    layers: str | None,
    tokens: Path | None,
    dialogues: bool,
    count: int | None,
    length: int | None,
    chunk: int,
    padding: int,
    seed: int,
    html: Path | None,
    as_json: bool,
) -> None:
    """Compare a bundle's engine with ONNX Runtime on the bundle's graph, tensor by tensor.

    The judge runs the graph that was exported, the engine under test what was built from it, both in Polygraphy's
    Comparator on the same packed calls. Where they differ, operators are run one by one on the judge's inputs, and the
    first diverging tensor is named. Of a CHECKPOINT, --layers compares single layers with an independent model.
    Exit code 1 means that a figure is beyond its threshold (docs/validation.md).

    \b
    Example:
      angelforge validate bundle --operator-by-operator --html report.html
    """
    refuse_other_tokens()
    data = DataOptions(tokens, dialogues, count, length, chunk, padding, seed)
    chosen = _layers(layers)
    require_writable("--html", html)
    if not (subject / FILE).is_file() and (subject / "config.json").is_file():
        if chosen is None:
            raise UsageError(f"{subject} is a checkpoint: name layers of it with --layers 0,1, or export it first.")
        refuse_for_checkpoint()
        _checkpoint(subject, chosen, data, as_json)
    elif against is not None:
        refuse_for_study()
        _study(subject, against, data, html, as_json)
    else:
        if draft:
            refuse_for_draft()
        _bundle(subject, engine, reference, (by_layer, by_operator, draft), chosen, data, html, as_json)


def _bundle(
    subject: Path,
    engine: str,
    reference: str | None,
    modes: tuple[bool, bool, bool],
    layers: list[int] | None,
    data: DataOptions,
    html: Path | None,
    as_json: bool,
) -> None:
    from angelforge.tools.validate_bundle import Job, run_job
    from angelforge.tools.validate_draft import run_draft
    from angelforge.tools.validate_page import write_page
    from angelforge.tools.validate_report import print_validation
    from angelforge.tools.validate_verdict import verdict

    with total_progress("validate", "layers") as report:
        by_layer, by_operator, draft = modes
        if draft:
            result = run_draft(subject, engine, reference, data, report)
        else:
            result = run_job(Job(subject, engine, reference, by_layer, by_operator, layers, data), report)
    judged = None if result.ok else verdict(result)
    if html is not None:
        write_page(html, result, judged)
    if as_json:
        told = None if judged is None else {"text": judged.text, "next": [command for command, _ in judged.next]}
        print_json({**result.to_dict(), "verdict": told})
    else:
        print_validation(result, html, judged)
    if judged is not None:
        _fail(judged.text, as_json)


def _checkpoint(subject: Path, layers: list[int], data: DataOptions, as_json: bool) -> None:
    from angelforge.tools.validate_layers import check_layers
    from angelforge.tools.validate_report import layers_dict, print_layers

    with total_progress("validate", "layers") as report:
        checks = check_layers(subject, layers, data.length, data.seed, report)
    if as_json:
        print_json(layers_dict(subject, checks))
    else:
        print_layers(checks)
    if not all(check.ok for check in checks):
        _fail("A layer of the graph does not compute what the independent model does; see above.", as_json)


def _study(subject: Path, against: str, data: DataOptions, html: Path | None, as_json: bool) -> None:
    from angelforge.tools.validate_page import write_study_page
    from angelforge.tools.validate_report import print_study
    from angelforge.tools.validate_study import run_study

    with total_progress("validate", "layers") as report:
        study = run_study(subject, against, data, report)
    if html is not None:
        write_study_page(html, study)
    if as_json:
        print_json(study.to_dict())
    else:
        print_study(study, html)


def _fail(message: str, as_json: bool) -> None:
    """Exit code 1; JSON has said why already, and must stay one document."""
    if as_json:
        click.get_current_context().exit(1)
    raise AngelForgeError(message)


def _layers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and len(part) < 10 for part in parts):
        raise UsageError(f"--layers is {text!r}, but numbers are needed, such as 0,1,31.")
    return list(dict.fromkeys(map(int, parts)))
