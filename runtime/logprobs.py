"""Logprobs: natural logarithms of the softmax of the raw logits, before any sampling option."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from angelforge.errors import AngelForgeError
from angelforge.runtime.batch import Float32
from angelforge.runtime.selection import top_ids


@dataclass(frozen=True)
class TokenLogprob:
    """A token, its logprob, and the likeliest tokens at its place with theirs, likeliest first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def row_logprobs(logits: Any, tokens: Sequence[int], count: int) -> list[TokenLogprob]:
    """Of `tokens` [n] by rows of logits [n, vocab], a NumPy array or a torch tensor, with the `count` likeliest.

    Raises AngelForgeError where a row's logits are not finite numbers.
    """
    one = _from_array if isinstance(logits, np.ndarray) else _from_tensor
    return [one(logits[row], token, count) for row, token in enumerate(tokens)]


def _from_array(logits: Float32, token: int, count: int) -> TokenLogprob:
    peak = logits.max()
    with np.errstate(invalid="ignore"):
        weights = np.exp(logits - peak)
    total = float(peak) + float(np.log(weights.sum(dtype=np.float64)))
    _require_finite(total)
    ids = top_ids(logits, count)[:count].tolist() if count else []
    return TokenLogprob(token, float(logits[token]) - total, tuple((i, float(logits[i]) - total) for i in ids))


def _from_tensor(logits: Any, token: int, count: int) -> TokenLogprob:
    """The same where the row lies: a few numbers come to the host."""
    total = float(logits.double().logsumexp(0))
    _require_finite(total)
    values, ids = logits.topk(count)
    top = zip(ids.tolist(), values.tolist(), strict=True)
    return TokenLogprob(token, float(logits[token]) - total, tuple((i, value - total) for i, value in top))


def _require_finite(total: float) -> None:
    if not np.isfinite(total):
        raise AngelForgeError(
            "The engine computed no finite logits, so there are no logprobs. Check the weights with `inspect --verify`."
        )
