"""A decoding step of sequences that already hold a context: what a scheduler would pack, over scattered pages."""

from dataclasses import dataclass

import numpy as np
import torch

from angelforge.config import ModelConfig
from angelforge.runtime.batch import INPUTS, Batch
from angelforge.runtime.packing import Piece, pack


@dataclass(frozen=True)
class Case:
    """One step: `batch` sequences that have `context` tokens each when it is done, one of them new."""

    batch: int
    context: int

    def pages(self, page_size: int) -> int:
        """Pages of the pool that it takes, page 0 included."""
        return 1 + self.batch * -(-self.context // page_size)

    def __str__(self) -> str:
        size = f"{self.context // 1024}K" if self.context % 1024 == 0 else str(self.context)
        return f"batch {self.batch} at {size}"


def decode_batch(config: ModelConfig, case: Case, page_size: int, seed: int) -> Batch:
    """The packed call: random ids, every sequence's pages scattered over the pool."""
    rng = np.random.default_rng(seed)
    each = -(-case.context // page_size)
    order = rng.permutation(case.batch * each).astype(np.int32) + 1
    ids = rng.integers(0, config.vocab_size, (case.batch, 1))
    pieces = [Piece(ids[i], case.context - 1, order[i * each : (i + 1) * each], 1) for i in range(case.batch)]
    return pack(pieces, page_size)


def on_device(batch: Batch, device: str) -> dict[str, torch.Tensor]:
    """The graph's bookkeeping inputs, each in memory of its own."""
    return {name: torch.from_numpy(getattr(batch, name)).to(device) for name in INPUTS}
