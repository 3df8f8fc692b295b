"""What a device computes to choose tokens: Triton's kernels do it on a GPU, torch elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, eq=False)
class Measured:
    """What logprobs need of m rows of raw logits."""

    peak: torch.Tensor  # f32 [m] the largest logit
    total: torch.Tensor  # f64 [m] the sum of exp(logit - peak)
    logit: torch.Tensor  # f32 [m] the token's; any number where there is none
    values: torch.Tensor  # f32 [m, count] the largest logits, in any order
    ids: torch.Tensor  # int32 [m, count] whose they are; of ties the lowest


class Work(Protocol):
    """What is done with rows of logits f32 [R, vocab], which lie without gaps; nothing is waited for.

    A row's result depends on its own logits and rules alone. Rows are named int64, each at most once in a call.
    """

    def prepare(self, vocab: int, device: torch.device) -> None:
        """Makes ready on a device what rows of `vocab` logits need; raises AngelForgeError where that fails."""

    def choose(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor,
        rules: torch.Tensor,
        uniform: torch.Tensor,
        mask_of: torch.Tensor | None,
        words: torch.Tensor | None,
    ) -> torch.Tensor:
        """A token int64 [n] for each of `rows` [n]; −1 where the largest logit that is allowed is not finite, or NaN.

        `rules` f64 [n, 4]: temperature (0: greedy), top_k (0, or the vocabulary's size or more: none), top_p (1: none)
        and min_p (0: none). `uniform` f64 [n], in [0, 1): the first id at which the running sum of the kept weights, in
        the order of ids, passes its part of the whole is taken. `mask_of` int32 [n]: which of `words` int32 [m, w] is a
        row's mask, −1 for none; bit i of word j allows the id 32 j + i, ids beyond the words are not allowed.
        """

    def penalize(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor,
        begins: torch.Tensor,
        sizes: torch.Tensor,
        penalties: torch.Tensor,
        ahead_ids: torch.Tensor | None,
        ahead_counts: torch.Tensor | None,
        table: torch.Tensor,
        widest: int,
    ) -> None:
        """Takes penalties from `logits` in place, as `distribution.adjust`; each id of a row is treated once.

        Row i of `rows` [k] has seen the ids and counts in `table` int32 [entries, 2] from `begins` int64 [k] on, as
        many as `sizes` int64 [k] say (at most `widest`, perhaps none). `penalties` f32 [k, 3]: repetition (1: none),
        frequency, presence (0: none). `ahead_ids` int32 [k, a], each once in a row, −1 for none, have the counts
        `ahead_counts` f32 [k, a] instead of the table's.
        """

    def measure(self, logits: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor, count: int) -> Measured:
        """Of `rows` [m] and their `tokens` int64 [m] (−1: none), with the `count` ≥ 0 largest logits."""


def work_of(device: torch.device) -> Work:
    """What computes on a device."""
    if device.type == "cuda":
        from angelforge.runtime.device_kernels import KernelWork  # it needs triton

        return KernelWork()
    from angelforge.runtime.device_torch import TorchWork

    return TorchWork()
