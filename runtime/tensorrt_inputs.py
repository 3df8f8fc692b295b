"""The bookkeeping inputs of a step in one stretch of memory, so that a single copy brings them to the device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import Any

import numpy as np

from angelforge.runtime.batch import Batch, Int64
from angelforge.runtime.device import ALIGNMENT, Device
from angelforge.runtime.packing import Padding

ROWS = "rows"  # int64 [T], of a draft: which state each token goes on from; read before the engine runs


@dataclass(frozen=True)
class InputLayout:
    """Where each input of a step of exactly these sizes lies; offsets are multiples of 256 bytes."""

    size: Padding

    @cached_property
    def shapes(self) -> MappingProxyType[str, tuple[int, ...]]:
        """Shapes by name."""
        size = self.size
        tokens, sequences = (size.tokens,), (size.sequences,)
        return MappingProxyType(
            {
                "input_ids": tokens,
                "positions": tokens,
                "num_tokens": (1,),
                "query_start": (size.sequences + 1,),
                "kv_length": sequences,
                "slots": tokens,
                "logit_indices": (size.rows,),
                ROWS: tokens,
                "page_table": (size.sequences, size.pages),
            }
        )

    @cached_property
    def offsets(self) -> MappingProxyType[str, int]:
        """Bytes from the begin, by name."""
        found, end = {}, 0
        for name, shape in self.shapes.items():
            found[name] = end
            end += -(-_bytes(name, shape) // ALIGNMENT) * ALIGNMENT
        return MappingProxyType(found)

    @cached_property
    def nbytes(self) -> int:
        """Of all inputs together; the page table is the last."""
        return self.offsets["page_table"] + _bytes("page_table", self.shapes["page_table"])


@lru_cache(maxsize=1024)
def layout_of(size: Padding) -> InputLayout:
    """The layout of a size, computed once: every step asks for one."""
    return InputLayout(size)


class InputArena:
    """One pinned buffer on the host and one of its size on the device."""

    def __init__(self, device: Device, nbytes: int) -> None:
        self._device = device
        self._host, self._arena = device.staging(nbytes), device.allocate(nbytes)
        self._bytes = self._host.numpy()
        self._sent: Any = None  # event of the last copy: until then the host's buffer is being read
        self._views: dict[InputLayout, dict[str, Any]] = {}

    def addresses(self, layout: InputLayout) -> dict[str, int]:
        """Where the inputs are on the device."""
        return {name: int(self._arena.data_ptr()) + offset for name, offset in layout.offsets.items()}

    def on_device(self, layout: InputLayout, name: str) -> Any:
        """One input on the device, a torch tensor of int64."""
        begin = layout.offsets[name]
        nbytes = _bytes(name, layout.shapes[name])
        return self._arena[begin : begin + nbytes].view(_torch_int64()).view(layout.shapes[name])

    def keep(self, layout: InputLayout) -> None:
        """Prepares a layout that will be used again and again."""
        self._views[layout] = self._views_of(layout)

    def send(self, layout: InputLayout, batch: Batch, rows: Int64 | None, page_size: int, stream: Any) -> None:
        """Puts one copy of `batch`, padded to the layout's sizes as `packing.pack` does, on `stream`.

        Entries of the page table that no token needs are left as they are: the graph ignores them.
        """
        if self._sent is not None:
            self._device.wait(self._sent)
        views = self._views.get(layout) or self._views_of(layout)
        write_batch(views, batch, page_size)
        if rows is not None:
            views[ROWS][: rows.shape[0]] = rows
            views[ROWS][rows.shape[0] :] = 0
        with self._device.on(stream):
            self._arena[: layout.nbytes].copy_(self._host[: layout.nbytes], non_blocking=True)
        self._sent = self._device.mark(stream)

    def _views_of(self, layout: InputLayout) -> dict[str, Any]:
        found = {}
        for name, shape in layout.shapes.items():
            begin = layout.offsets[name]
            found[name] = self._bytes[begin : begin + _bytes(name, shape)].view(_dtype(name)).reshape(shape)
        return found


def write_batch(views: dict[str, Any], batch: Batch, page_size: int) -> None:
    """Writes a batch and its padding into arrays that are as large or larger."""
    tokens, sequences = batch.input_ids.shape[0], batch.kv_length.shape[0]
    rows, columns = batch.logit_indices.shape[0], batch.page_table.shape[1]
    for name, padding in (("input_ids", 0), ("positions", 0)):
        views[name][:tokens] = getattr(batch, name)
        views[name][tokens:] = padding
    views["num_tokens"][:] = batch.num_tokens
    views["query_start"][: sequences + 1] = batch.query_start
    views["query_start"][sequences + 1 :] = batch.query_start[-1]
    views["kv_length"][:sequences] = batch.kv_length
    views["kv_length"][sequences:] = 0
    views["page_table"][:sequences, :columns] = batch.page_table
    slots = views["slots"]
    slots[:tokens] = batch.slots
    if slots.shape[0] > tokens:  # spread over page 0
        slots[tokens:] = np.arange(slots.shape[0] - tokens, dtype=np.int32) % page_size
    views["logit_indices"][:rows] = batch.logit_indices
    views["logit_indices"][rows:] = 0


def _dtype(name: str) -> type[np.generic]:
    return np.int64 if name in ("input_ids", "logit_indices", ROWS) else np.int32


def _bytes(name: str, shape: tuple[int, ...]) -> int:
    return int(np.prod(shape)) * np.dtype(_dtype(name)).itemsize


def _torch_int64() -> Any:
    import torch

    return torch.int64
