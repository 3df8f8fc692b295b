"""The next token of every request of a step, chosen where the logits are.

What requests ask for goes to the device in one copy, the ids come back in one; between them nothing is waited for.
Histories are sent anew with each step, each id once: some kilobytes a request, as many as its distinct tokens. Keeping
them on the device would save that copy and cost a table of the vocabulary's width for each request.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from angelforge.runtime.batch import Int64
from angelforge.runtime.device import to_host
from angelforge.runtime.device_distribution import Rules, draw_rows, kept_weights
from angelforge.runtime.sampler import is_argmax

if TYPE_CHECKING:
    from angelforge.runtime.constraint import Constraint
    from angelforge.runtime.history import Counted
    from angelforge.runtime.sampler import Drawing
    from angelforge.runtime.sampling import SamplingParams

# Columns of what is sent for each row.
_TEMPERATURE, _TOP_K, _TOP_P, _MIN_P, _UNIFORM, _REPETITION, _FREQUENCY, _PRESENCE = range(8)


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
    """Arrays that go to a device in one copy."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._arrays: dict[str, Any] = {}
        self._sent: dict[str, torch.Tensor] = {}

    def add(self, name: str, array: Any) -> None:
        """An array of a NumPy type that torch has, too."""
        self._arrays[name] = np.ascontiguousarray(array)

    def send(self) -> None:
        """One copy of all; on a GPU from pinned memory, which torch keeps until the copy is done."""
        ends = np.cumsum([-(-array.nbytes // 8) * 8 for array in self._arrays.values()])
        host = torch.empty(int(ends[-1]), dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        octets, begin = host.numpy(), 0
        for array, end in zip(self._arrays.values(), ends.tolist(), strict=True):
            octets[begin : begin + array.nbytes] = array.reshape(-1).view(np.uint8)
            begin = end
        there = host.to(self._device, non_blocking=True)
        begin = 0
        for (name, array), end in zip(self._arrays.items(), ends.tolist(), strict=True):
            dtype = torch.from_numpy(array[:0].copy()).dtype
            self._sent[name] = there[begin : begin + array.nbytes].view(dtype).view(array.shape)
            begin = end

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._sent[name]

    def get(self, name: str) -> torch.Tensor | None:
        """None for what was not added."""
        return self._sent.get(name)


def sample_on_device(logits: torch.Tensor, requests: Sequence[Drawing]) -> Int64:
    """One token id for each request, int64 [R] on the host, from its row of `logits` f32 [R, vocab] on a device.

    −1 where nothing can come: the row has no finite largest logit. The distribution is that of `sampler.sample` on the
    host; with equal seeds the tokens differ from those, but not from run to run, whatever else is in the batch. Raises
    AngelForgeError where the device fails in this or earlier work.
    """
    special = [row for row, request in enumerate(requests) if not is_argmax(request)]
    if len(special) < len(requests):
        ids = _finite_argmax(logits)
    if special:
        packed = Packed(logits.device)
        chosen = [requests[row] for row in special]
        drawn = _draw(logits, special, chosen, packed)
        if len(special) == len(requests):
            ids = drawn
        else:
            ids[packed["rows"]] = drawn
    found: Int64 = to_host(ids)
    return found


def adjusted_rows(logits: torch.Tensor, requests: Sequence[Asked], packed: Packed) -> torch.Tensor:
    """Rows f32 [n, vocab] after bias, penalties and masks, as `distribution.adjusted` makes them; a copy.

    `packed` has been filled by `pack_requests` and sent.
    """
    x = logits.index_select(0, packed["rows"]) if packed["rows"].shape[0] < logits.shape[0] else logits.clone()
    flat, vocab = x.view(-1), x.shape[1]
    if (places := packed.get("biased")) is not None:
        flat[places] = flat[places] + packed["bias"]
    if (places := packed.get("seen")) is not None:
        table, counts = packed["rules"], packed["counts"]
        row = places // vocab
        values = flat[places]
        repetition = table[_REPETITION].float()[row]
        values = torch.where(values > 0, values / repetition, values * repetition)
        values = values - table[_FREQUENCY].float()[row] * counts
        values = values - table[_PRESENCE].float()[row] * (counts > 0)
        flat[places] = values
    if (words := packed.get("words")) is not None:
        bits = (words.unsqueeze(2) >> torch.arange(32, dtype=torch.int32, device=x.device)) & 1  # [m, words, 32]
        allowed = torch.zeros((words.shape[0], vocab), dtype=torch.bool, device=x.device)
        known = bits.flatten(1)[:, :vocab].bool()
        allowed[:, : known.shape[1]] = known
        masked = packed["masked"]
        x[masked] = x[masked].masked_fill(~allowed, -torch.inf)
    return x


def pack_requests(
    rows: Sequence[int], requests: Sequence[Asked], vocab: int, packed: Packed, drawing: bool = True
) -> Rules:
    """Puts what `requests` ask for their `rows` of the logits into `packed`, sends it, and gives the rules there.

    Where there is `drawing`, a request that samples draws one number from its own generator.
    """
    table = np.empty((8, len(rows)), np.float64)
    biased, bias, seen, counts, masked, words = [], [], [], [], [], []
    for place, request in enumerate(requests):
        params, start = request.params, place * vocab
        top_k = params.top_k if 0 < params.top_k < vocab else vocab
        uniform = request.rng.random() if drawing and not params.greedy else 0.0
        table[:, place] = (
            *(params.temperature, top_k, params.top_p, params.min_p, uniform),
            *(params.repetition_penalty, params.frequency_penalty, params.presence_penalty),
        )
        if params.logit_bias:
            biased.append(params.bias.ids + start)
            bias.append(params.bias.values_f32)
        if params.penalizes:
            assert request.history is not None
            seen.append(request.history.ids + start)
            counts.append(request.history.counts)
        if request.constraint is not None:
            masked.append(place)
            words.append(request.constraint.mask())
    packed.add("rows", np.array(rows, np.int64))
    packed.add("rules", table)
    if biased:
        packed.add("biased", np.concatenate(biased))
        packed.add("bias", np.concatenate(bias))
    if seen:
        packed.add("seen", np.concatenate(seen))
        packed.add("counts", np.concatenate(counts))
    if masked:
        packed.add("masked", np.array(masked, np.int64))
        packed.add("words", np.stack(words).view(np.int32))
    packed.send()
    sampled = table[_TEMPERATURE] > 0
    limited = sampled & (table[_TOP_K] < vocab)
    nucleus = sampled & (table[_TOP_P] < 1)
    sent = packed["rules"].unsqueeze(2)  # [8, n, 1]
    return Rules(
        temperature=sent[_TEMPERATURE],
        top_k=sent[_TOP_K],
        top_p=sent[_TOP_P],
        min_p=sent[_MIN_P],
        largest_k=int(table[_TOP_K][limited].max(initial=0)),
        every_nucleus_sorted=not (nucleus & ~limited).any(),
        nucleus=bool(nucleus.any()),
        floor=bool((sampled & (table[_MIN_P] > 0)).any()),
    )


def _draw(logits: torch.Tensor, rows: Sequence[int], requests: Sequence[Drawing], packed: Packed) -> torch.Tensor:
    rules = pack_requests(rows, requests, logits.shape[1], packed)
    x = adjusted_rows(logits, requests, packed)
    best = x.argmax(1, keepdim=True)  # the first of several largest
    finite, chosen = x.gather(1, best).isfinite(), best
    if not all(request.params.greedy for request in requests):
        drawn = draw_rows(kept_weights(x, best, rules), best, packed["rules"][_UNIFORM].unsqueeze(1))
        chosen = torch.where(rules.temperature > 0, drawn, best)
    return torch.where(finite, chosen, -1).squeeze(1)


def _finite_argmax(logits: torch.Tensor) -> torch.Tensor:
    best = logits.argmax(1, keepdim=True)
    return torch.where(logits.gather(1, best).isfinite(), best, -1).squeeze(1)
