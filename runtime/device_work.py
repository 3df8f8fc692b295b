"""What a device computes to choose tokens: Triton's kernels do it on a GPU, torch elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch


@dataclass(frozen=True, eq=False)
class Measured:
    """What logprobs need of m rows of raw logits."""

    peak: torch.Tensor  # f32 [m] the largest logit
    total: torch.Tensor  # f64 [m] the sum of exp(logit - peak)
    logit: torch.Tensor  # f32 [m] the token's; any number where there is none
    values: torch.Tensor  # f32 [m, count] the largest logits, in any order
    ids: torch.Tensor  # int32 [m, count] whose they are; of ties the lowest


class Draws(NamedTuple):
    """Rows that give a token each, and by which rules."""

    rows: torch.Tensor  # int64 [n]
    # f64 [n, 4]: temperature (0: greedy), top_k (0, or the vocabulary's size or more: none), top_p (1: none), min_p
    rules: torch.Tensor
    uniform: torch.Tensor  # f64 [n] in [0, 1)
    mask_of: torch.Tensor | None = None  # int32 [n]: which of `words` is a row's mask, −1 for none
    words: torch.Tensor | None = None  # int32 [m, w]: bit i of word j allows the id 32 j + i, none beyond


class SeenRows(NamedTuple):
    """Rows with penalties, and what was seen before each: ids and how often they count."""

    rows: torch.Tensor  # int64 [k]
    begins: torch.Tensor  # int64 [k]: where in `table` each row's entries begin
    sizes: torch.Tensor  # int64 [k]: how many there are
    penalties: torch.Tensor  # f32 [k, 3]: repetition (1: none), frequency, presence (0: none)
    table: torch.Tensor  # int32 [entries, 2]: id, count
    widest: int  # the most that `sizes` say
    ahead_ids: torch.Tensor | None = None  # int32 [k, a], each once in a row, −1 for none: these have
    ahead_counts: torch.Tensor | None = None  # f32 [k, a] such counts instead of the table's


class Work(Protocol):
    """What is done with rows of logits f32 [R, vocab], which lie without gaps; nothing is waited for.

    A row's result depends on its own logits and rules alone. Rows are named int64, each at most once in a call.
    """

    def prepare(self, vocab: int, device: torch.device) -> None:
        """Makes ready on a device what rows of `vocab` logits need; raises AngelForgeError where that fails."""

    def choose(self, logits: torch.Tensor, draws: Draws) -> torch.Tensor:
        """A token int64 [n] for each row; −1 where the largest logit that is allowed is not finite, or NaN.

        The first id is taken at which the running sum of the kept weights, in the order of ids, passes `uniform`'s part
        of the whole.
        """

    def penalize(self, logits: torch.Tensor, seen: SeenRows) -> None:
        """Takes penalties from `logits` in place, as `distribution.adjust`; each id of a row is treated once."""

    def measure(self, logits: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor, count: int) -> Measured:
        """Of `rows` [m] and their `tokens` int64 [m] (−1: none), with the `count` ≥ 0 largest logits."""


def work_of(device: torch.device) -> Work:
    """What computes on a device."""
    if device.type == "cuda":
        from angelforge.runtime.device_kernels import KernelWork  # it needs triton

        return KernelWork()
    from angelforge.runtime.device_torch import TorchWork

    return TorchWork()
