"""Trains the toy model: next tokens of answers, experts balanced through the router's bias."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from angelforge.tools.toy.data import Batch
from angelforge.tools.toy.model import ToyModel

Report = Callable[[str], None]

_OTHER = 0.1  # weight of what callers say, against 1 for answers
_BIAS_STEP = 2e-3
_WARMUP = 20  # steps


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then half a cosine down to a twentieth."""
    if step < _WARMUP:
        return peak * (step + 1) / _WARMUP
    share = (step - _WARMUP) / max(1, steps - _WARMUP)
    return peak * (0.05 + 0.95 * (1 + math.cos(math.pi * share)) / 2)


def optimise(
    parameters: list[torch.nn.Parameter],
    loss_of: Callable[[Batch], Tensor],
    data: Iterator[Batch],
    steps: int,
    peak: float,
    report: Report,
    after: Callable[[int], None] = lambda step: None,
) -> None:
    """`steps` steps of AdamW on `loss_of` a batch; `after` each step may look at what happened."""
    optimiser = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    mean = 0.0
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        loss = loss_of(next(data))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        after(step)
        mean = loss.item() if step == 0 else 0.95 * mean + 0.05 * loss.item()
        if (step + 1) % 50 == 0:
            report(f"step {step + 1} of {steps}: loss {mean:.3f}")


def train_model(model: ToyModel, data: Iterator[Batch], steps: int, report: Report) -> None:
    """Trains in place. The bias of an expert rises while it is chosen less than the others (arXiv 2408.15664)."""

    def loss_of(batch: Batch) -> Tensor:
        logits, _ = model(batch.ids[:, :-1])
        losses = functional.cross_entropy(logits.flatten(0, 1), batch.ids[:, 1:].flatten(), reduction="none")
        weights = torch.where(batch.answer, 1.0, _OTHER) * batch.real
        weights = weights[:, 1:].flatten()
        return (losses * weights).sum() / weights.sum()

    def balance(step: int) -> None:
        for router in model.routers():
            router.expert_bias += _BIAS_STEP * torch.sign(router.load.mean() - router.load)

    optimise(list(model.parameters()), loss_of, data, steps, 4e-3, report, balance)


@torch.no_grad()  # type: ignore[untyped-decorator]
def answer_accuracy(model: ToyModel, batch: Batch) -> float:
    """Share of the answers' tokens that are the model's first choice."""
    logits, _ = model(batch.ids[:, :-1])
    right = (logits.argmax(-1) == batch.ids[:, 1:]) & batch.answer[:, 1:]
    return float(right.sum() / batch.answer[:, 1:].sum())
