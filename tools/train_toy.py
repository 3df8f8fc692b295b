"""Trains the toy model and its EAGLE3 draft: `python -m angelforge.tools.train_toy FOLDER` (needs torch).

Less than ten minutes on one core. Everything is seeded: the same kind of machine and versions give the same files.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

import click

from angelforge.tools.options import NUMBER

SEED = 1
MODEL_STEPS = 900
DRAFT_STEPS = 300
BATCH = 16  # dialogues


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--threads", default=1, show_default=True, help="Processor cores to use; changes rounding.")
@click.option(
    "--steps", type=NUMBER, default=1.0, show_default=True, help="Share of the usual training steps, for a quick try."
)
@click.option("--only", type=click.Choice(["model", "draft"]), help="Train one of the two; the other one is there.")
def train_toy(folder: Path, threads: int, steps: float, only: str | None) -> None:
    """Train the toy model and its draft into FOLDER/model and FOLDER/draft.

    \b
    Example:
      python -m angelforge.tools.train_toy toy
    """
    import torch

    torch.set_num_threads(threads)
    begin = perf_counter()

    def report(line: str) -> None:
        click.echo(f"{perf_counter() - begin:5.0f} s  {line}", err=True)

    if only != "draft":
        _train_model(folder / "model", max(1, round(MODEL_STEPS * steps)), report)
    if only != "model":
        _train_draft(folder, max(1, round(DRAFT_STEPS * steps)), report)


def _train_model(folder: Path, steps: int, report: Callable[[str], Any]) -> None:
    import torch

    from angelforge.config import ModelConfig
    from angelforge.exporter.synthetic_tokenizer import write_tokenizer
    from angelforge.tools.toy.data import batches
    from angelforge.tools.toy.files import CONFIG, POSITIONS, VOCABULARY, save_generation_config, save_tensors
    from angelforge.tools.toy.grammar import texts
    from angelforge.tools.toy.model import ToyModel
    from angelforge.tools.toy.tokenizer import Encoder
    from angelforge.tools.toy.training import answer_accuracy, train_model

    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, VOCABULARY, POSITIONS, islice(texts(random.Random(SEED)), 8000))
    encoder = Encoder(folder)
    torch.manual_seed(SEED)
    model = ToyModel(ModelConfig.from_dict(CONFIG))
    train_model(model, batches(encoder, BATCH, SEED), steps, report)
    report(f"{answer_accuracy(model, next(batches(encoder, 64, SEED + 1))):.1%} of unseen answers' tokens are right")
    save_tensors(folder, model.state_dict(), CONFIG)
    save_generation_config(folder)


def _train_draft(folder: Path, steps: int, report: Callable[[str], Any]) -> None:
    import torch

    from angelforge.config import ModelConfig
    from angelforge.draft_config import DraftConfig
    from angelforge.tools.toy.data import batches
    from angelforge.tools.toy.draft import ToyDraft
    from angelforge.tools.toy.draft_training import accepted_length, frequent_ids, train_draft
    from angelforge.tools.toy.files import DRAFT_CONFIG, load_tensors, save_tensors
    from angelforge.tools.toy.model import ToyModel
    from angelforge.tools.toy.tokenizer import Encoder

    encoder = Encoder(folder / "model")
    target = ToyModel(ModelConfig.load(folder / "model"))
    target.load_state_dict(load_tensors(folder / "model"))  # as it is stored: rounded to bf16
    config = DraftConfig.from_dict(DRAFT_CONFIG, target.config)
    torch.manual_seed(SEED)
    draft = ToyDraft(config, frequent_ids(batches(encoder, BATCH, SEED), config.draft_vocab_size, config.vocab_size))
    train_draft(draft, target, batches(encoder, BATCH, SEED + 2), steps, report)
    report(
        f"{accepted_length(draft, target, next(batches(encoder, 64, SEED + 1))):.2f} tokens a call on unseen answers"
    )
    save_tensors(folder / "draft", draft.state_dict(), DRAFT_CONFIG)


if __name__ == "__main__":
    train_toy()
