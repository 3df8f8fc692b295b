"""Logprobs of rows of logits that lie on a device: a few numbers a row, which come to the host with the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from angelforge.runtime.device_transfer import Packed, Parcel
from angelforge.runtime.logprobs import TokenLogprob, require_finite

_ROWS = 64  # that are worked on at once, which takes as much memory again as they have


def pack_rows(packed: Packed, rows: Sequence[int]) -> None:
    """Adds to `packed` which rows are to be measured."""
    packed.add("measured", np.array(rows, np.int64))


def measure(
    logits: torch.Tensor, packed: Packed, parcel: Parcel, count: int, one: torch.Tensor, few: torch.Tensor | None
) -> None:
    """Puts into `parcel` what logprobs need of rows of `logits` f32 [R, vocab]; how many rows `packed` knows.

    `count`: of the likeliest tokens; `one` int64 [a]: the token of each of the first rows; `few` int64 [b, W]: the
    tokens that may come in each of the rows after those.
    """
    rows = packed["measured"]
    totals, tops, top_ids, ones, fews = [], [], [], [], []
    for begin in range(0, rows.shape[0], _ROWS):
        end = min(begin + _ROWS, rows.shape[0])
        some = logits.index_select(0, rows[begin:end])
        peak = some.amax(1, keepdim=True)
        totals.append(peak + (some - peak).exp().sum(1, keepdim=True, dtype=torch.float64).log())
        top = some.topk(count)
        tops.append(top.values)
        top_ids.append(top.indices)
        split = min(max(one.shape[0] - begin, 0), end - begin)
        if split:
            # −1 stands for no token: what is told of it is not asked for
            ones.append(some[:split].gather(1, one[begin : begin + split].clamp(min=0).unsqueeze(1)))
        if few is not None and begin + split < end:
            at = begin + split - one.shape[0]
            fews.append(some[split:].gather(1, few[at : at + end - begin - split]))
    parcel.add("totals", torch.cat(totals))
    if count:
        parcel.add("top", torch.cat(tops))
        parcel.add("top.ids", torch.cat(top_ids))
    if ones:
        parcel.add("one", torch.cat(ones))
    if fews:
        parcel.add("few", torch.cat(fews))


def told(found: dict[str, Any], row: int, token: int, logit: float, count: int) -> TokenLogprob:
    """The logprob of a token by the measured row number `row`, with the `count` likeliest.

    `found` is what the parcel brought, `logit` the token's. Raises AngelForgeError where they are not finite.
    """
    total = float(found["totals"][row, 0])
    require_finite(total)
    top: tuple[tuple[int, float], ...] = ()
    if count:
        pairs = zip(found["top"][row].tolist(), found["top.ids"][row].tolist(), strict=True)
        ordered = sorted((-value, token) for value, token in pairs)[:count]
        top = tuple((token, -value - total) for value, token in ordered)
    return TokenLogprob(token, logit - total, top)


def device_logprobs(logits: torch.Tensor, tokens: Sequence[int], count: int) -> list[TokenLogprob]:
    """Of `tokens` [n] by the rows of `logits` f32 [n, vocab]."""
    packed, parcel = Packed(logits.device), Parcel()
    pack_rows(packed, range(len(tokens)))
    packed.add("tokens", np.array(tokens, np.int64))
    packed.send()
    measure(logits, packed, parcel, count, packed["tokens"], None)
    found = parcel.fetch()
    return [told(found, row, token, float(found["one"][row, 0]), count) for row, token in enumerate(tokens)]
