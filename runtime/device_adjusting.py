"""Bias, penalties and grammar masks on rows of logits that lie on a device, sent there in one copy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

if TYPE_CHECKING:
    from angelforge.runtime.batch import Float32
    from angelforge.runtime.constraint import Constraint
    from angelforge.runtime.history import Counted
    from angelforge.runtime.sampling import SamplingParams


Fill = Callable[[Any], None]  # writes an array into a view of the memory that is copied


class Asked(Protocol):
    """What is looked at of a request, or of one place of its chain of proposals."""

    @property
    def params(self) -> SamplingParams:
        """Its rules."""

    @property
    def rng(self) -> np.random.Generator:
        """Its own generator."""

    @property
    def history(self) -> Counted | None:
        """Of prompt and output so far, where something is penalised."""

    @property
    def constraint(self) -> Constraint | None:
        """Its grammar."""


class Packed:
    """Arrays that go to a device in one copy, written where it is copied from."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._parts: list[tuple[str, np.dtype[Any], tuple[int, ...], Fill]] = []
        self._sent: dict[str, torch.Tensor] = {}

    def add(self, name: str, array: Any) -> None:
        """An array of a NumPy type that torch has, too."""
        self.fill(name, array.dtype, array.shape, lambda view: np.copyto(view, array))

    def fill(self, name: str, dtype: Any, shape: Sequence[int], write: Fill) -> None:
        """One that `write` is to write."""
        self._parts.append((name, np.dtype(dtype), tuple(shape), write))

    @property
    def empty(self) -> bool:
        """Whether nothing was added."""
        return not self._parts

    def send(self) -> None:
        """One copy of all; on a GPU from pinned memory, which torch keeps until the copy is done."""
        sizes = [math.prod(shape) * dtype.itemsize for _, dtype, shape, _ in self._parts]
        total = sum(-(-size // 8) * 8 for size in sizes)
        host = torch.empty(total, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        octets, places, begin = host.numpy(), [], 0
        for (_, dtype, shape, write), size in zip(self._parts, sizes, strict=True):
            write(octets[begin : begin + size].view(dtype).reshape(shape))
            places.append(begin)
            begin += -(-size // 8) * 8
        there = host.to(self._device, non_blocking=True)
        for (name, dtype, shape, _), begin, size in zip(self._parts, places, sizes, strict=True):
            self._sent[name] = there[begin : begin + size].view(_TORCH[dtype]).view(shape)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._sent[name]

    def get(self, name: str) -> torch.Tensor | None:
        """None for what was not added."""
        return self._sent.get(name)


_TORCH = {np.dtype(name): getattr(torch, name) for name in ("int32", "int64", "float32", "float64")}


def adjusted_rows(logits: torch.Tensor, rows: Sequence[int], requests: Sequence[Asked]) -> torch.Tensor:
    """Rows of `logits` f32 [R, vocab] after what their requests ask for, f32 [n, vocab], as `distribution.adjusted`.

    A copy where anything is changed or left out. Histories are sent anew with each step, each id once: some kilobytes a
    request. Keeping them on the device would save that and cost a table as wide as the vocabulary for each request.
    """
    packed = pack_adjustments(logits.shape, rows, requests, logits.device)
    if packed is None:
        return logits
    x = logits.clone() if (chosen := packed.get("rows")) is None else logits.index_select(0, chosen)
    flat = x.view(-1)
    if (places := packed.get("biased")) is not None:
        flat[places] = flat[places] + packed["bias"]
    if (places := packed.get("seen")) is not None:
        values = flat[places]
        if (factor := packed.get("repetition")) is not None:
            values = torch.where(values > 0, values / factor, values * factor)
        for name in ("frequency", "presence"):
            if (taken := packed.get(name)) is not None:
                values = values - taken
        flat[places] = values
    if (words := packed.get("words")) is not None:
        bits = (words.unsqueeze(2) >> torch.arange(32, dtype=torch.int32, device=x.device)) & 1  # [m, words, 32]
        known = bits.flatten(1)[:, : x.shape[1]].bool()
        allowed = torch.zeros((words.shape[0], x.shape[1]), dtype=torch.bool, device=x.device)
        allowed[:, : known.shape[1]] = known  # ids beyond the mask are not allowed
        x[packed["masked"]] = x[packed["masked"]].masked_fill(~allowed, -torch.inf)
    return x


def pack_adjustments(
    shape: Sequence[int], rows: Sequence[int], requests: Sequence[Asked], device: torch.device
) -> Packed | None:
    """All that changes `rows` of logits [R, vocab], on its way to the device; None if they are all, as they are."""
    packed, vocab = Packed(device), shape[1]
    if len(rows) < shape[0] or any(row != place for place, row in enumerate(rows)):
        packed.add("rows", np.array(rows, np.int64))
    placed = list(enumerate(requests))
    if biased := [(place, request.params.bias) for place, request in placed if request.params.logit_bias]:
        packed.add("biased", np.concatenate([bias.ids + place * vocab for place, bias in biased]))
        packed.add("bias", np.concatenate([bias.values_f32 for _, bias in biased]))
    if seen := [(place, request) for place, request in placed if request.params.penalizes]:
        _pack_penalties(packed, vocab, seen)
    if masks := [(place, request.constraint.mask()) for place, request in placed if request.constraint is not None]:
        packed.add("masked", np.array([place for place, _ in masks]))
        packed.add("words", np.stack([words for _, words in masks]).view(np.int32))
    if packed.empty:
        return None
    packed.send()
    return packed


def _pack_penalties(packed: Packed, vocab: int, seen: Sequence[tuple[int, Asked]]) -> None:
    histories = [request.history for _, request in seen if request.history is not None]
    assert len(histories) == len(seen)
    sizes = [history.ids.shape[0] for history in histories]
    total = sum(sizes)

    def places(view: Any) -> None:
        begin = 0
        for (place, _), history, size in zip(seen, histories, sizes, strict=True):
            np.add(history.ids, place * vocab, out=view[begin : begin + size])
            begin += size

    def each(name: str) -> Float32:
        """A penalty for every id f32 [m]: one call for all is faster than one for each request."""
        return np.repeat(np.array([getattr(request.params, name) for _, request in seen], np.float32), sizes)

    packed.fill("seen", np.int64, (total,), places)
    asked = [request.params for _, request in seen]
    if any(params.repetition_penalty != 1.0 for params in asked):
        packed.add("repetition", each("repetition_penalty"))
    if all(params.frequency_penalty == params.presence_penalty == 0.0 for params in asked):
        return
    counts = np.concatenate([history.counts for history in histories])
    if any(params.frequency_penalty != 0.0 for params in asked):
        packed.add("frequency", counts * each("frequency_penalty"))
    if any(params.presence_penalty != 0.0 for params in asked):
        packed.add("presence", (counts > 0) * each("presence_penalty"))
