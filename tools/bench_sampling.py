"""`angelforge bench sampling`: choosing tokens on this machine's GPU, right and how fast."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from angelforge.errors import AngelForgeError, UsageError
from angelforge.exporter.synthetic_config import FULL_CONFIG
from angelforge.tools.gpu_needed import require_gpu
from angelforge.tools.options import require_writable

if TYPE_CHECKING:
    from angelforge.tools.sampling_report import Report


@click.command()
@click.option("--seed", default=1, show_default=True, help="Of the random rows.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write all figures to this file.")
def sampling(seed: int, json_file: Path | None) -> None:
    """Check and time the kernels that choose tokens, at AntAngelMed's vocabulary. Needs a CUDA GPU.

    Tokens are compared with those that the host draws from the same logits and numbers. Times are of the kernels in a
    CUDA graph: without the copy to the device, the one of ids back (some µs each), and the host's part, which is done
    while the step is computed. Beside them stands what the same takes as torch operations. Exit code 1 if any token
    is wrong.

    \b
    Example:
      angelforge bench sampling --json sampling.json
    """
    if not 0 <= seed < 2**63:
        raise UsageError(f"--seed is {seed}, but a number from 0 to 2⁶³ − 1 is needed.")
    require_writable("--json", json_file)
    facts = require_gpu("bench sampling")
    import torch

    from angelforge.tools.sampling_report import measure_all

    def save(known: Report) -> None:
        if json_file is not None:
            from angelforge.atomic import write_atomic

            write_atomic(json_file, json.dumps(known.to_dict(), indent=1, ensure_ascii=False) + "\n")

    def say(text: str) -> None:
        click.echo(text, err=True)

    report = measure_all(facts.name, torch.device("cuda:0"), FULL_CONFIG["vocab_size"], seed, say, save)
    click.echo(report.markdown())
    if report.problems:
        raise AngelForgeError(f"{len(report.problems)} things are wrong; they stand below the table.")
