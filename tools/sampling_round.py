"""A step that asks for everything at once, chosen on a device by the kernels and by torch: both must say the same.

Masks of grammars, bias, penalties behind proposals and logprobs go the whole way that they go in `run` and `serve`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch

from angelforge.runtime.constraint import UInt32
from angelforge.runtime.device_adjusting import Place
from angelforge.runtime.device_round import Scored
from angelforge.runtime.device_sampling import DeviceSampler
from angelforge.runtime.device_torch import TorchWork
from angelforge.runtime.device_work import Work
from angelforge.runtime.history import History
from angelforge.runtime.logprobs import TokenLogprob
from angelforge.runtime.sampling import SamplingParams
from angelforge.tools.sampling_bench import KINDS

LIKELIEST = 5  # that are told beside a token
SCORED = 3  # rows of a prompt
NEAR = 1e-4  # of a logprob
PROPOSED = (3, 5, 3)
_RULES = {
    "greedy": SamplingParams(),
    "temperature": SamplingParams(temperature=1.0),
    "penalties": SamplingParams(frequency_penalty=1.0, presence_penalty=0.5),
    "all rules": SamplingParams(**KINDS["top-k 20, top-p 0.95, penalties"], min_p=0.01, logit_bias={1: 4.0, 7: -4.0}),
}


@dataclass(frozen=True)
class _Grammar:
    """Allows every third id or so."""

    words: UInt32

    def mask(self) -> UInt32:
        return self.words

    def accept(self, token: int) -> None:
        """It stays as it is."""


def check_round(work: Work, vocab: int, device: torch.device, seed: int) -> list[str]:
    """What `work` says otherwise than torch of rows of `vocab` logits, a sentence each."""
    pairs = zip(_told(work, vocab, device, seed), _told(TorchWork(), vocab, device, seed), strict=True)
    return [
        f"{name}: {ours}, but torch gives {theirs}" for (name, ours), (_, theirs) in pairs if not _same(ours, theirs)
    ]


def _told(work: Work, vocab: int, device: torch.device, seed: int) -> Iterator[tuple[str, TokenLogprob]]:
    """What each row asks for, and its token with its logprob."""
    rng = np.random.default_rng(seed)
    names: list[str] = []
    places: list[Place] = []
    for rules, masked, ahead in product(_RULES, (False, True), ((), PROPOSED)):
        names.append(f"{rules}{', a mask' * masked}{', behind proposals' * bool(ahead)}")
        grammar = _Grammar(rng.integers(0, 2**32, -(-vocab // 32), np.uint32)) if masked else None
        history = History(rng.integers(0, vocab, 50), np.concatenate((rng.integers(0, vocab, 20), [3, 3])))
        places.append(
            Place(len(places), _RULES[rules], history, np.random.default_rng(seed), grammar, ahead, LIKELIEST)
        )
    scored = [Scored(len(places) + each, int(rng.integers(0, vocab)), LIKELIEST) for each in range(SCORED)]
    logits = rng.standard_normal((len(places) + SCORED, vocab), np.float32) * 6  # few are likely: no rounding decides
    for place in places:
        if place.params is _RULES["penalties"]:  # a proposal is the likeliest, but for its penalty
            logits[place.row, PROPOSED[1]] = logits[place.row].max() + 1
    answer = DeviceSampler(device, work).answer(torch.from_numpy(logits).to(device), places, scored)
    for name, place, token in zip(names, places, answer.tokens.tolist(), strict=True):
        yield name, answer.logprob(place.row, token, LIKELIEST)
    for one in scored:
        yield "a prompt", answer.logprob(one.row, one.token, LIKELIEST)


def _same(ours: TokenLogprob, theirs: TokenLogprob) -> bool:
    numbers = [(ours.logprob, theirs.logprob), *((a[1], b[1]) for a, b in zip(ours.top, theirs.top, strict=True))]
    ids = [each[0] for each in ours.top] == [each[0] for each in theirs.top]
    return ours.token == theirs.token and ids and all(abs(a - b) <= NEAR for a, b in numbers)
