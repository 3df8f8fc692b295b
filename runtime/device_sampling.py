"""The next token of every request of a step, chosen where the logits are.

What requests ask for goes to the device in one copy. What comes back depends on their rules: the largest logit's id,
the few largest logits (rules are applied to these on the host), or an id that was drawn from the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from angelforge.runtime.batch import Int64
from angelforge.runtime.device import to_host
from angelforge.runtime.device_adjusting import Packed, adjusted_rows
from angelforge.runtime.device_distribution import Rules, draw_rows, kept_weights
from angelforge.runtime.device_largest import RowRules, candidates_of, draw_each, is_narrow, largest_of
from angelforge.runtime.sampler import is_argmax

if TYPE_CHECKING:
    from angelforge.runtime.device_adjusting import Asked
    from angelforge.runtime.sampler import Drawing
    from angelforge.runtime.sampling import SamplingParams


def sample_on_device(logits: torch.Tensor, requests: Sequence[Drawing]) -> Int64:
    """One token id for each request, int64 [R] on the host, from its row of `logits` f32 [R, vocab] on a device.

    −1 where nothing can come: the row has no finite largest logit. The distribution is that of `sampler.sample` on the
    host; so are the tokens of requests with a seed and a top-k. A row's result depends on its request alone. Raises
    AngelForgeError where the device fails in this or earlier work.
    """
    special = [row for row, request in enumerate(requests) if not is_argmax(request)]
    best = _finite_argmax(logits) if len(special) < len(requests) else None
    if not special:
        assert best is not None or not requests
        return np.empty(0, np.int64) if best is None else np.asarray(to_host(best))
    asked = [requests[row] for row in special]
    x = adjusted_rows(logits, special, asked)
    narrow = [place for place, request in enumerate(asked) if is_narrow(request.params, x.shape[1])]
    whole = sorted(set(range(len(asked))) - set(narrow))
    # All work is handed out before the first result is waited for.
    rules = RowRules.of([asked[place].params for place in narrow], x.shape[1]) if narrow else None
    table = largest_of(_rows_of(x, narrow), rules) if rules is not None else None
    drawn = draw_from_all(x, whole, asked) if whole else None
    ids = np.empty(len(asked), np.int64)
    if table is not None and rules is not None:
        found = candidates_of(to_host(table), rules)
        ids[narrow] = draw_each(found, [asked[place] for place in narrow])
        if undecided := [place for place, decided in zip(narrow, found.decided, strict=True) if not decided]:
            ids[undecided] = to_host(draw_from_all(x, undecided, asked))
    if drawn is not None:
        ids[whole] = to_host(drawn)
    if best is None:
        return ids
    tokens = np.array(to_host(best))
    tokens[special] = ids
    return tokens


def draw_from_all(x: torch.Tensor, places: Sequence[int], requests: Sequence[Asked]) -> torch.Tensor:
    """Ids int64 [n] on the device, drawn from all that the rules keep in the rows `places` of `x`; −1 as above."""
    asked = [requests[place] for place in places]
    uniform = np.array([0.0 if request.params.greedy else request.rng.random() for request in asked])
    packed = Packed(x.device)
    rules = pack_rules([request.params for request in asked], x.shape[1], packed, uniform)
    rows = _rows_of(x, places)
    best = rows.argmax(1, keepdim=True)
    drawn = draw_rows(kept_weights(rows, best, rules), best, packed["uniform"].unsqueeze(1))
    chosen = torch.where(rules.temperature > 0, drawn, best)
    return torch.where(rows.gather(1, best).isfinite(), chosen, -1).squeeze(1)


def pack_rules(params: Sequence[SamplingParams], vocab: int, packed: Packed, uniform: np.ndarray) -> Rules:
    """Sends the rules of n rows, and their numbers `uniform` f64 [n] in [0, 1)."""
    top_k = np.array([each.top_k if 0 < each.top_k < vocab else vocab for each in params])
    sampled = np.array([not each.greedy for each in params])
    top_p, min_p = (np.array([getattr(each, name) for each in params]) for name in ("top_p", "min_p"))
    limited, nucleus = sampled & (top_k < vocab), sampled & (top_p < 1)
    packed.add("rules", np.stack([np.array([each.temperature for each in params]), top_k, top_p, min_p]))
    packed.add("uniform", uniform)
    packed.send()
    temperature, k, p, floor = packed["rules"].unsqueeze(2)  # f64 [n, 1] each
    return Rules(
        temperature=temperature,
        top_k=k,
        top_p=p,
        min_p=floor,
        largest_k=int(top_k[limited].max(initial=0)),
        every_nucleus_sorted=not (nucleus & ~limited).any(),
        nucleus=bool(nucleus.any()),
        floor=bool((sampled & (min_p > 0)).any()),
    )


def _rows_of(x: torch.Tensor, places: Sequence[int]) -> torch.Tensor:
    """Some rows of `x`; all of them without a copy."""
    if len(places) == x.shape[0]:
        return x
    packed = Packed(x.device)
    packed.add("places", np.array(places, np.int64))
    packed.send()
    return x.index_select(0, packed["places"])


def _finite_argmax(logits: torch.Tensor) -> torch.Tensor:
    best = logits.argmax(1, keepdim=True)  # the first of several largest
    return torch.where(logits.gather(1, best).isfinite(), best, -1).squeeze(1)
