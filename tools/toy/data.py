"""Batches of toy dialogues for training."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from angelforge.exporter.synthetic_tokenizer import PAD
from angelforge.tools.toy.grammar import dialogue
from angelforge.tools.toy.tokenizer import Encoder

_POOL = 8  # batches that are sorted by length together: less padding


@dataclass(frozen=True, eq=False)
class Batch:
    """Dialogues side by side, padded at the end."""

    ids: Tensor  # int64 [B, T]
    answer: Tensor  # bool [B, T], tokens that a model is to learn
    real: Tensor  # bool [B, T], not padding


def batches(encoder: Encoder, size: int, seed: int) -> Iterator[Batch]:
    """Endless batches of `size` fresh dialogues; equal seeds give equal batches."""
    rng = random.Random(seed)
    while True:
        pool = sorted((encoder.encode(dialogue(rng)) for _ in range(_POOL * size)), key=lambda pair: len(pair[0]))
        parts = [pool[begin : begin + size] for begin in range(0, len(pool), size)]
        rng.shuffle(parts)
        for part in parts:
            longest = max(len(ids) for ids, _ in part)
            ids, answer = np.full((size, longest), PAD), np.zeros((size, longest), bool)
            real = np.zeros((size, longest), bool)
            for row, (tokens, learnt) in enumerate(part):
                ids[row, : len(tokens)], answer[row, : len(tokens)], real[row, : len(tokens)] = tokens, learnt, True
            yield Batch(torch.from_numpy(ids), torch.from_numpy(answer), torch.from_numpy(real))
