"""What a step's rows of logits give, chosen where the logits are: one copy there, one copy back.

What requests ask for goes to the device in one copy. What comes back are ids and, where they are asked for, the few
numbers of logprobs; all of it in one copy, which is the only thing that is waited for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from angelforge.runtime.batch import Int64
from angelforge.runtime.device import bound_to, explained_gpu
from angelforge.runtime.device_adjusting import Place, Standing
from angelforge.runtime.device_history import DeviceHistories
from angelforge.runtime.device_logprobs import told
from angelforge.runtime.device_round import Round, Scored
from angelforge.runtime.device_transfer import Packed
from angelforge.runtime.device_work import Work, work_of
from angelforge.runtime.logprobs import TokenLogprob


class DeviceSampler:
    """Chooses tokens on one device for requests that come and go, and keeps there what was seen of them.

    The tokens are those of `sampler.sample` on the host, but for the rounding of sums. A row's result depends on its
    request alone.
    """

    def __init__(self, device: torch.device, work: Work | None = None) -> None:
        """`work` is what computes, by default what is made for the device.

        Raises AngelForgeError where the device fails in this or earlier work.
        """
        self.device = device
        self.work = work_of(device) if work is None else work
        with explained_gpu():
            self.histories = DeviceHistories(device)
        self._packed: Packed | None = None  # of the last round, as the next
        self._standing = Standing(0, ())

    def answer(self, logits: torch.Tensor, draws: Sequence[Place], scored: Sequence[Scored] = ()) -> Answer:
        """What places give in rows of `logits` f32 [R, vocab]: tokens, and logprobs where they ask for any.

        Bias and penalties change the logits. Raises AngelForgeError where the device fails in this or earlier work.
        """
        round_ = Round(draws, scored)
        # A launch too tells of a lack of memory, or of what failed before it.
        with bound_to(self.device), explained_gpu():
            packed = self.prepare(round_, logits.shape[1])
            return Answer(round_, round_.compute(logits, packed, self.histories, self.work).fetch())

    def prepare(self, round_: Round, vocab: int) -> Packed:
        """Sends what the device has to know for a round over rows of `vocab` logits."""
        packed = Packed(self.device, self._packed)
        if not self._standing.holds(vocab, round_.draws):
            self._standing = Standing(vocab, round_.draws)
        round_.pack(packed, self.histories, self._standing)
        packed.send()
        self._packed = packed
        return packed


class Answer:
    """What the places of a round gave."""

    def __init__(self, round_: Round, found: dict[str, Any]) -> None:
        # int64 [draws]; −1 where nothing can come: the row has no finite largest logit
        self.tokens: Int64 = found["tokens"] if round_.draws else np.empty(0, np.int64)
        self._found = found
        self._numbers = {row: number for number, row in enumerate(round_.measured)}

    def logprob(self, row: int, token: int, count: int) -> TokenLogprob:
        """Of the token of a row that asked for it, with the `count` likeliest.

        Raises AngelForgeError where a row has no finite logits.
        """
        return told(self._found, self._numbers[row], token, count)
