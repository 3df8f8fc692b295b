"""`Work` in plain torch: on CPUs, and what the kernels are compared with. It sorts whole rows and waits for nothing."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from angelforge.runtime.device_work import Draws, Measured, SeenRows
from angelforge.runtime.distribution import LARGEST_DIVISOR, SMALLEST_DIVISOR

_ROWS = 16  # that are sorted at once: it takes six times their memory


class TorchWork:
    """See `Work`."""

    def prepare(self, vocab: int, device: torch.device) -> None:
        """There is nothing to do."""

    def choose(self, logits: torch.Tensor, draws: Draws) -> torch.Tensor:
        """As the protocol's; a NaN that a mask forbids is no NaN."""
        chosen = []
        for begin in range(0, draws.rows.shape[0], _ROWS):
            some = slice(begin, begin + _ROWS)
            x = logits.index_select(0, draws.rows[some])  # [n, vocab]
            if draws.mask_of is not None and draws.words is not None:
                x = torch.where(_allowed(draws.mask_of[some], draws.words, x.shape[1]), x, -torch.inf)
            chosen.append(_choose(x, draws.rules[some], draws.uniform[some].unsqueeze(1)))
        return torch.cat(chosen)

    def penalize(self, logits: torch.Tensor, seen: SeenRows) -> None:
        """As the protocol's."""
        x, vocab = logits.index_select(0, seen.rows), logits.shape[1]
        counts = x.new_full((x.shape[0], vocab + 1), -1.0)  # −1: not seen; what is no id goes to the last column
        places = torch.arange(seen.widest, device=x.device)
        known = places < seen.sizes.unsqueeze(1)  # [k, widest]
        wanted = torch.where(known, seen.begins.unsqueeze(1) + places, 0)
        ids, times = seen.table.index_select(0, wanted.view(-1)).view(*known.shape, 2).unbind(2)
        counts.scatter_(1, torch.where(known, ids, vocab).long(), times.float())
        if seen.ahead_ids is not None and seen.ahead_counts is not None:
            counts.scatter_(1, torch.where(seen.ahead_ids < 0, vocab, seen.ahead_ids).long(), seen.ahead_counts)
        counts = counts[:, :vocab]
        repetition, frequency, presence = seen.penalties.unsqueeze(2).unbind(1)  # [k, 1] each
        changed = torch.where(x > 0, x / repetition, x * repetition) - frequency * counts - presence * (counts > 0)
        logits.index_copy_(0, seen.rows, torch.where(counts < 0, x, changed))

    def measure(self, logits: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor, count: int) -> Measured:
        """As the protocol's."""
        parts = []
        for begin in range(0, rows.shape[0], _ROWS):
            some = slice(begin, begin + _ROWS)
            x = logits.index_select(0, rows[some])  # [n, vocab]
            peak = x.amax(1, keepdim=True)
            total = (x - peak).exp().sum(1, dtype=torch.float64)
            logit = x.gather(1, tokens[some].clamp(min=0).unsqueeze(1)).squeeze(1)
            values, ids = x.sort(dim=1, descending=True, stable=True)
            parts.append((peak.squeeze(1), total, logit, values[:, :count], ids[:, :count].int()))
        return Measured(*(torch.cat(each) for each in zip(*parts, strict=True)))


def _choose(x: torch.Tensor, rules: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """A token int64 [n] of each row of `x` f32 [n, vocab], with `uniform` f64 [n, 1]."""
    vocab = x.shape[1]
    temperature, top_k, top_p, min_p = rules.unsqueeze(2).unbind(1)  # f64 [n, 1] each
    values, ids = x.sort(dim=1, descending=True, stable=True)  # a NaN comes first, of ties the lowest id
    peak = values[:, :1]
    weights = ((values - peak) / temperature.clamp(SMALLEST_DIVISOR, LARGEST_DIVISOR).float()).exp()
    last = torch.where((top_k > 0) & (top_k < vocab), top_k, vocab).long() - 1
    weights = torch.where(values >= values.gather(1, last), weights, 0.0)  # ties with the last are kept, too
    sums = weights.cumsum(1, dtype=torch.float64)
    before = pad(sums[:, :-1], (1, 0))  # a token is kept if those before it do not hold enough yet
    kept = ((before < top_p * sums[:, -1:]) | (top_p >= 1)) & (weights >= min_p)
    sums = torch.zeros_like(weights).scatter(1, ids, torch.where(kept, weights, 0.0)).cumsum(1, dtype=torch.float64)
    drawn = torch.searchsorted(sums, uniform * sums[:, -1:], right=True)
    chosen = torch.where(temperature > 0, drawn, ids[:, :1])
    return chosen.masked_fill(~(peak.abs() < torch.inf), -1).squeeze(1)


def _allowed(mask_of: torch.Tensor, words: torch.Tensor, vocab: int) -> torch.Tensor:
    """bool [n, vocab]: what the masks of n rows allow."""
    bits = (words.unsqueeze(2) >> torch.arange(32, dtype=torch.int32, device=words.device)) & 1  # [m, w, 32]
    known = bits.flatten(1)[:, :vocab].bool()
    masks = pad(known, (0, vocab - known.shape[1]))
    return masks.index_select(0, mask_of.clamp(min=0)) | (mask_of < 0).unsqueeze(1)
