"""Logprobs: natural logarithms of the softmax of the raw logits, before any sampling option."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from angelforge.errors import AngelForgeError
from angelforge.runtime.batch import Float32
from angelforge.runtime.selection import top_ids

_ROWS = 64  # of a device's logits that are worked on at once, which takes as much memory again as they have


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
    if isinstance(logits, np.ndarray):
        return [_from_array(logits[row], token, count) for row, token in enumerate(tokens)]
    return _from_tensor(logits, tokens, count) if tokens else []


def _from_array(logits: Float32, token: int, count: int) -> TokenLogprob:
    peak = logits.max()
    with np.errstate(invalid="ignore"):
        weights = np.exp(logits - peak)
    total = float(peak) + float(np.log(weights.sum(dtype=np.float64)))
    _require_finite(total)
    ids = top_ids(logits, count)[:count].tolist() if count else []
    return TokenLogprob(token, float(logits[token]) - total, tuple((i, float(logits[i]) - total) for i in ids))


def _from_tensor(logits: Any, tokens: Sequence[int], count: int) -> list[TokenLogprob]:
    """The same for rows on a device [n, vocab]: a few numbers a row come to the host, in one copy."""
    import torch

    from angelforge.runtime.device import to_host

    peak = logits.amax(1, keepdim=True)
    total = peak + (logits - peak).exp().sum(1, keepdim=True, dtype=torch.float64).log()
    chosen = logits.gather(1, torch.tensor(tokens, device=logits.device).unsqueeze(1))
    values, ids = logits.topk(count)
    found = []
    table = to_host(torch.cat((total, chosen.double(), values.double(), ids.double()), 1))
    for token, row in zip(tokens, table, strict=True):
        _require_finite(row[0])
        top = sorted((-value, int(i)) for value, i in zip(row[2 : 2 + count], row[2 + count :], strict=True))
        likeliest = tuple((i, float(-value - row[0])) for value, i in top)
        found.append(TokenLogprob(token, float(row[1] - row[0]), likeliest))
    return found


def _require_finite(total: float) -> None:
    if not np.isfinite(total):
        raise AngelForgeError(
            "The engine computed no finite logits, so there are no logprobs. Check the weights with `inspect --verify`."
        )
