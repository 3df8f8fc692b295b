"""How alike two models' predictions are: figures that say what a change of precision costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class Agreement:
    """Of the predictions at a number of positions."""

    positions: int
    top1: float  # share of positions at which both prefer the same token
    mean_kl: float  # KL(expected ‖ found) in nats, mean and largest over the positions
    max_kl: float


def agreement(found: Array, expected: Array) -> Agreement:
    """Compares logits [T, vocab] with `expected` ones."""
    wanted, had = (_log_softmax(np.asarray(logits, np.float64)) for logits in (expected, found))
    divergence = (np.exp(wanted) * (wanted - had)).sum(axis=1)  # [T]
    same = found.argmax(axis=1) == expected.argmax(axis=1)
    return Agreement(len(same), float(same.mean()), float(divergence.mean()), float(divergence.max()))


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))
