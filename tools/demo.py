"""`angelforge demo`: the whole way with a toy model and its draft, in one command."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import click

from angelforge.errors import AngelForgeError
from angelforge.tools.options import json_option
from angelforge.tools.output import format_bytes, format_seconds, print_json, print_table

if TYPE_CHECKING:
    from angelforge.tools.demo_answers import Answers

TOLERANCE = 2e-5  # of logits, relative to the largest
NOTICE = "The answers are those of a toy that was trained on invented calls. They have no medical value."


@dataclass
class Journey:
    """What was done, how long it took, and where the result is."""

    rows: list[tuple[str, str, float, str]] = field(default_factory=list)

    @contextmanager
    def step(self, name: str) -> Iterator[list[str]]:
        """Times a step; the block appends what it did and, if it made one, where the file is."""
        click.echo(f"{name} …", err=True)
        notes: list[str] = []
        begin = perf_counter()
        yield notes
        self.rows.append((name, notes[0], perf_counter() - begin, notes[1] if len(notes) > 1 else ""))


@click.command()
@click.option(
    "--folder", type=click.Path(path_type=Path), default=Path("demo"), show_default=True, help="Where to put the files."
)
@json_option
def demo(folder: Path, as_json: bool) -> None:
    """Compile and run a toy model of AntAngelMed's architecture, and its EAGLE3 draft.

    Exports the two checkpoints that come with AngelForge, builds the CPU engines, lets the toy answer a few callers
    without and with the draft, and compares its logits with an independent NumPy implementation of the model. The toy
    has 2.5 million parameters and was trained on invented calls: it has no medical value.

    \b
    Example:
      angelforge demo --folder /tmp/angelforge-demo
    """
    from angelforge.engines.cpu import build_cpu, engine_folder
    from angelforge.exporter.export import ExportOptions, export
    from angelforge.tools.demo_answers import answer, compare
    from angelforge.tools.toy import DRAFT, MODEL

    journey, bundle = Journey(), folder / "bundle"
    with journey.step("export the toy and its draft") as notes:
        opened = export(str(MODEL), bundle, ExportOptions(draft=str(DRAFT)))
        weights = sum(record.size for name, record in opened.manifest.files.items() if name.startswith("weights/"))
        model = opened.manifest.model
        told = f"{model.num_hidden_layers} layers, {model.num_experts} experts, {format_bytes(weights)} of weights"
        notes += [told, str(bundle)]
    with journey.step("build their engines") as notes:
        engine = engine_folder(opened, "cpu") / build_cpu(opened).engine
        notes += [f"{format_bytes(engine.stat().st_size)}, without weights", str(engine)]
    with journey.step("answer without the draft") as notes:
        plain = answer(bundle, speculate=0)
        notes += [plain.describe()]
    with journey.step("answer with the draft") as notes:
        drafted = answer(bundle, speculate=4)
        notes += [drafted.describe()]
    with journey.step("compare with the reference") as notes:
        error, told = compare(bundle, MODEL, drafted)
        notes += [told]
    if as_json:
        print_json(_facts(journey, plain, drafted, error))
    else:
        _tell(journey, plain, drafted, bundle)
    if plain.tokens != drafted.tokens:
        raise AngelForgeError(
            "With the draft other tokens came out than without. Please report this with: angelforge doctor --json"
        )
    if error > TOLERANCE:
        raise AngelForgeError(
            f"The logits differ from the reference by {error:.1e} of the largest, expected at most {TOLERANCE:.0e}. "
            "Please report this with the output of: angelforge doctor --json"
        )


def _tell(journey: Journey, plain: Answers, drafted: Answers, bundle: Path) -> None:
    from angelforge.tools.speculation_text import describe

    for question, text in drafted.texts:
        click.echo(f"  caller: {question}\n     toy: {text}\n")
    click.echo(NOTICE)
    print_table(
        ("step", "result", "time", "where"),
        [(name, result, format_seconds(seconds), path) for name, result, seconds, path in journey.rows],
    )
    if drafted.report is not None:
        click.echo(describe(drafted.report))
    same = "the same" if plain.tokens == drafted.tokens else "NOT the same"
    calls = f"{plain.calls_per_100:.0f} without the draft, {drafted.calls_per_100:.0f} with it"
    faster = f"{plain.seconds / drafted.seconds:.1f} times as fast here"
    click.echo(f"target calls for 100 tokens: {calls} ({faster}); the tokens are {same}")
    click.echo(f"Next: {sys.argv[0]} run {bundle} --chat")


def _facts(journey: Journey, plain: Answers, drafted: Answers, error: float) -> dict[str, object]:
    from dataclasses import asdict

    return {
        "notice": NOTICE,
        "steps": [dict(zip(("step", "result", "seconds", "path"), row, strict=True)) for row in journey.rows],
        "answers": [{"question": question, "answer": text} for question, text in drafted.texts],
        "relative_error": error,
        "same_tokens": plain.tokens == drafted.tokens,
        "target_calls_per_100_tokens": {"without_draft": plain.calls_per_100, "with_draft": drafted.calls_per_100},
        "speedup": plain.seconds / drafted.seconds,
        "speculation": None if drafted.report is None else asdict(drafted.report),
    }
