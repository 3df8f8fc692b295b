"""A draft that computes nothing, for `bench host`: what speculation costs the host is timed, not what it gains.

Its proposals are the tokens that the sampler's stand-in then gives: all of them come out, so that a step has as much to
take, to detokenise and to hand out as it can have.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from angelforge.dtypes import DType
from angelforge.engines.profiles import StepLimits, make_profiles
from angelforge.runtime.batch import INPUTS, Batch, Int64
from angelforge.runtime.device import Device, to_host
from angelforge.runtime.tensorrt_buckets import Buckets
from angelforge.runtime.tensorrt_buffers import Buffer, largest_of
from angelforge.runtime.tensorrt_inputs import ROWS, InputArena, InputLayout
from angelforge.runtime.tensorrt_runner import Fixed, Runner
from angelforge.runtime.tensorrt_session import TensorrtSession
from angelforge.tools.no_tensorrt import empty_library

BOUND, KERNELS = 28, 21  # tensors and nodes of an EAGLE3 draft of one layer
_WIDTH = 8  # of a state, instead of the model's: picking states by row is the device's work
_IDS = 1 << 16


class Script:
    """The tokens of a measured text: those of a step's places, one request after another, then the next step's."""

    def __init__(self, vocab: int, each: int) -> None:
        """Ids below `vocab`, for requests with `each` places in a step: their own and those of proposals."""
        self._ids = np.random.default_rng(1).integers(256, vocab - 1, 2 * _IDS)
        self._each, self._begin = each, 0

    def draw(self, places: int) -> Int64:
        """The ids int64 [places] of a step, of at most 65,536 places."""
        begin = self._begin
        self._begin = (begin + places) % _IDS
        return self._ids[begin : begin + places]

    def propose(self, requests: int, place: int) -> Int64:
        """The ids int64 [requests] that the next step will draw at this place of each request's chain."""
        return self._ids[self._begin + place :][: requests * self._each : self._each]


class EmptyDraft:
    """Does what `TensorRTDraft` does around its engine, and then proposes what a script says; a `DraftEngine`."""

    def __init__(self, device: Device, stream: Any, limits: StepLimits, script: Script) -> None:
        """Beside a target of the same limits, whose stream it shares; it proposes `limits.draft_depth` tokens."""
        self.page_size, self.num_pages, self.max_depth = limits.page_size, limits.pages, limits.draft_depth
        profiles = make_profiles(limits)
        largest = largest_of(profiles)
        self.vocabulary: Int64 = np.arange(limits.max_batch)  # of which nothing is asked where a device samples
        self._script, self._place, self._rows = script, 0, 0
        self._own = largest.tokens  # where its rows begin among the states
        self._states = Buffer.of(device, DType.BF16, (2 * largest.tokens, _WIDTH)).tensor
        self._hidden = Buffer.of(device, DType.BF16, (largest.tokens, _WIDTH))
        self._logits = Buffer.of(device, DType.F32, (largest.rows, 1))
        self._ids = Buffer.of(device, DType.I64, (largest.rows,))
        names = [*INPUTS, "hidden", *(f"tensor.{number}" for number in range(BOUND - len(INPUTS) - 1))]
        fixed = Fixed(
            addresses={name: 256 * number for number, name in enumerate(names, 1)} | {"hidden": self._hidden.address},
            shapes={"hidden": (-1, _WIDTH)},
            activations=device.allocate(256),
            page_size=limits.page_size,
            largest=largest,
        )
        session = TensorrtSession(empty_library(names, device.torch, KERNELS), b"")
        buckets = Buckets(profiles, limits.max_batch, limits.draft_depth)
        self._runner = Runner(session, device, stream, buckets, fixed, self._gather)
        self._runner.capture()

    def follow(self, batch: Batch, rows: Int64) -> Int64:
        """The first proposals, after all else that a draft's step asks of the host."""
        return self._run(batch, rows, 0)

    def extend(self, batch: Batch) -> Int64:
        """The next ones."""
        return self._run(batch, np.arange(self._own, self._own + batch.input_ids.shape[0]), self._place + 1)

    def logits(self) -> Any:
        """On the device, where nobody looks at them."""
        return self._logits.tensor[: self._rows]

    def close(self) -> None:
        """Gives the runner back."""
        self._runner.close()

    def _run(self, batch: Batch, rows: Int64, place: int) -> Int64:
        self._place, self._rows = place, batch.logit_indices.shape[0]
        self._runner.run(batch, rows)
        to_host(self._ids.tensor[: self._rows])
        return self._script.propose(self._rows, place)

    def _gather(self, arena: InputArena, layout: InputLayout) -> None:
        rows = arena.on_device(layout, ROWS)
        torch.index_select(self._states, 0, rows, out=self._hidden.tensor[: layout.size.tokens])
