"""`angelforge demo`: the whole way with a small random model, in one command."""

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
    from angelforge.runtime.llm import LLM

PROMPTS = ("The patient reports a dry cough since Monday.", "Take one tablet", "Blood pressure 140/90,")
TOLERANCE = 2e-5  # of logits, relative to the largest


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
    """Make, compile and run a small random model of AntAngelMed's architecture.

    Writes a checkpoint as Hugging Face lays it out, exports it, builds the CPU engine, generates with it, and compares
    its logits with an independent NumPy implementation of the model. Its weights are random, so its text means nothing.

    \b
    Example:
      angelforge demo --folder /tmp/angelforge-demo
    """
    from angelforge.engines.cpu import build_cpu, engine_folder
    from angelforge.exporter.export import ExportOptions, export
    from angelforge.exporter.synthetic import small_config, write_checkpoint
    from angelforge.runtime.llm import LLM

    journey = Journey()
    checkpoint, bundle = folder / "checkpoint", folder / "bundle"
    with journey.step("write a checkpoint") as notes:
        config = small_config()
        write_checkpoint(checkpoint, config)
        notes += [f"{config['num_hidden_layers']} layers, {config['num_experts']} experts, bf16", str(checkpoint)]
    with journey.step("export it") as notes:
        opened = export(str(checkpoint), bundle, ExportOptions())
        weights = sum(record.size for name, record in opened.manifest.files.items() if name.startswith("weights/"))
        notes += [f"graph and {format_bytes(weights)} of weights", str(bundle)]
    with journey.step("build its engine") as notes:
        engine = engine_folder(opened, "cpu") / build_cpu(opened).engine
        notes += [f"{format_bytes(engine.stat().st_size)}, without weights", str(engine)]
    with journey.step("load it") as notes:
        llm = LLM(bundle)
        notes += ["weights mapped from their files"]
    with llm:
        texts = _generate(llm, journey)
        error = _compare(llm, checkpoint, journey)
    if as_json:
        print_json(
            {
                "steps": [dict(zip(("step", "result", "seconds", "path"), row, strict=True)) for row in journey.rows],
                "texts": texts,
                "relative_error": error,
            }
        )
    else:
        for prompt, text in zip(PROMPTS, texts, strict=True):
            click.echo(f"{prompt!r} → {text!r}")
        print_table(
            ("step", "result", "time", "where"),
            [(name, result, format_seconds(seconds), path) for name, result, seconds, path in journey.rows],
        )
        click.echo(f'Next: {sys.argv[0]} run {bundle} --prompt "Good morning"')
    if error > TOLERANCE:
        raise AngelForgeError(
            f"The logits differ from the reference by {error:.1e} of the largest, expected at most {TOLERANCE:.0e}. "
            "Please report this with the output of: angelforge doctor --json"
        )


def _generate(llm: LLM, journey: Journey) -> list[str]:
    from angelforge.runtime.sampling import SamplingParams

    with journey.step("generate") as notes:
        begin = perf_counter()
        outputs = llm.generate(list(PROMPTS), SamplingParams(max_tokens=24, ignore_eos=True))
        count = sum(len(output.token_ids) for output in outputs)
        notes += [f"{count} tokens for {len(PROMPTS)} prompts at once, {count / (perf_counter() - begin):.0f} tokens/s"]
    return [output.text for output in outputs]


def _compare(llm: LLM, checkpoint: Path, journey: Journey) -> float:
    """The largest difference between the engine's and the reference's logits, relative to the largest logit."""
    import numpy as np

    from angelforge.runtime.validate.reference import load_reference

    with journey.step("compare with the reference") as notes:
        ids = list(np.random.default_rng(0).integers(0, llm.config.vocab_size, 96))
        found, expected = llm.score(ids), load_reference(checkpoint).logits(ids)
        error = float(np.abs(found - expected).max() / np.abs(expected).max())
        same = int((found.argmax(-1) == expected.argmax(-1)).sum())
        notes += [f"{len(ids)} positions: largest error {error:.1e}, same best token at {same}"]
    return error
