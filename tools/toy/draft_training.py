"""Trains the toy's draft: to say what the target would say, from the target's states and then from its own."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from angelforge.tools.toy.data import Batch
from angelforge.tools.toy.draft import ToyDraft
from angelforge.tools.toy.model import ToyModel
from angelforge.tools.toy.training import Report, optimise

STEPS = 4  # of a chain, as deep as the draft is meant to be used
_DECAY = 0.8  # weight of a step relative to the one before


def frequent_ids(data: Iterator[Batch], count: int, vocabulary: int) -> Tensor:
    """The `count` tokens that answers use most, ascending; with their help 50 batches are looked at."""
    seen = torch.zeros(vocabulary)
    for _ in range(50):
        batch = next(data)
        seen += torch.bincount(batch.ids[batch.answer], minlength=vocabulary)
    return seen.argsort(descending=True, stable=True)[:count].sort().values


def train_draft(draft: ToyDraft, target: ToyModel, data: Iterator[Batch], steps: int, report: Report) -> None:
    """Trains in place; `target` is not changed."""
    allowed = draft.t2d

    def loss_of(batch: Batch) -> Tensor:
        chosen, logits, learnt = _compute(draft, target, batch)
        wanted = chosen[..., allowed].log_softmax(-1).exp()  # [B, T, draft vocabulary]
        losses = []
        for step, guessed in enumerate(logits):
            distance = -(wanted * guessed.log_softmax(-1)).sum(-1)
            mask = learnt.clone()
            mask[:, :step] = False
            losses.append(_DECAY**step * (distance * mask).sum() / mask.sum())
        return torch.stack(losses).sum() / sum(_DECAY**step for step in range(STEPS))

    optimise(list(draft.parameters()), loss_of, data, steps, 4e-3, report)


@torch.no_grad()  # type: ignore[untyped-decorator]
def accepted_length(draft: ToyDraft, target: ToyModel, batch: Batch) -> float:
    """Tokens that a target call gives with chains of `STEPS`, if everything said so far is as in the dialogues.

    1 + the expected number of guesses in a row that are the target's first choice.
    """
    chosen, logits, learnt = _compute(draft, target, batch)
    best, names = chosen.argmax(-1), torch.arange(len(draft.d2t)) + draft.d2t
    right = [names[guessed.argmax(-1)] == best for guessed in logits]
    # A chain that begins at j is judged by step k at j + k.
    length = chosen.shape[1] - STEPS
    whole = torch.ones_like(learnt[:, :length])
    total = torch.zeros(whole.shape)
    for step, hit in enumerate(right):
        whole = whole & hit[:, step : step + length] & learnt[:, step : step + length]
        total += whole
    begun = learnt[:, :length]
    return float(1 + total[begun].sum() / begun.sum())


def _compute(draft: ToyDraft, target: ToyModel, batch: Batch) -> tuple[Tensor, list[Tensor], Tensor]:
    """(the target's logits for token j + 2 [B, T, vocab], those of every step of the draft, which of them count)."""
    with torch.no_grad():
        logits, streams = target(batch.ids[:, :-1])
        captured = torch.cat([streams[layer] for layer in draft.config.capture_layers], dim=-1)[:, :-1]
        embeddings = target.model.word_embeddings(batch.ids[:, 1:-1])
    return logits[:, 1:], draft(captured, embeddings, STEPS), batch.answer[:, 2:]
