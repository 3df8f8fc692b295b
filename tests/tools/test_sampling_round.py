"""`bench sampling` compares what it does not time, too: masks, logprobs and proposals, the whole way of a step."""

from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from angelforge.runtime.device_kernels import KernelWork
from angelforge.runtime.device_torch import TorchWork
from angelforge.runtime.device_work import Draws, Measured, SeenRows, Work
from angelforge.tools.sampling_round import check_round

VOCAB, CPU = 700, torch.device("cpu")


class NoMasks(TorchWork):
    def choose(self, logits: torch.Tensor, draws: Draws) -> torch.Tensor:
        return super().choose(logits, draws._replace(mask_of=None, words=None))


class NoProposals(TorchWork):
    def penalize(self, logits: torch.Tensor, seen: SeenRows) -> None:
        super().penalize(logits, seen._replace(ahead_ids=None, ahead_counts=None))


class OtherSums(TorchWork):
    def measure(self, logits: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor, count: int) -> Measured:
        found = super().measure(logits, rows, tokens, count)
        return replace(found, total=found.total * 1.001)


def test_the_kernels_agree_with_torch() -> None:
    """In Triton's interpreter."""
    with np.errstate(all="ignore"):
        assert check_round(KernelWork(), VOCAB, CPU, 1) == []


@pytest.mark.parametrize(
    ("work", "told"),
    [(NoMasks(), ", a mask"), (NoProposals(), "penalties, behind proposals"), (OtherSums(), "a prompt: ")],
)
def test_what_is_wrong_is_told(work: Work, told: str) -> None:
    assert any(told in each for each in check_round(work, VOCAB, CPU, 1))
