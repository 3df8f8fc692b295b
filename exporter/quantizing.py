"""Weights quantised while they are packed: e4m3 codes and scales as runs of a weight file.

Of what was made, only the scales are kept until they are written: 4 bytes for 16,384 weights of a file.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from angelforge.checkpoint import Checkpoint
from angelforge.exporter.openfiles import OpenFiles
from angelforge.exporter.pieces import DRAFT, Piece, Quantized
from angelforge.exporter.quantization_errors import Errors
from angelforge.exporter.strips import Strips, Workspace

Array = npt.NDArray[Any]


class FileQuantizer:
    """Quantises the tensors of one weight file, in one thread. `errors` holds what was lost, by kind of tensor."""

    def __init__(self, checkpoint: Checkpoint, files: OpenFiles) -> None:
        self.errors: dict[str, Errors] = {}
        self._checkpoint = checkpoint
        self._files = files
        self._scales: dict[tuple[Piece, ...], Array] = {}
        self._workspaces: dict[tuple[int, int], Workspace] = {}

    def runs(self, source: Quantized) -> Iterator[CodesRun | ScalesRun]:
        """The codes, or the scales, of every matrix of `source`; each run is made when it is asked for."""
        for pieces in source.matrices:
            if source.block not in self._workspaces:
                self._workspaces[source.block] = Workspace(source.block)
            infos = tuple(self._checkpoint.tensors[piece.tensor] for piece in pieces)
            strips = Strips(pieces, infos, source.block, self._files, self._workspaces[source.block])
            yield CodesRun(strips, self) if source.part == "codes" else ScalesRun(strips, self)

    def finish(self, strips: Strips, scales: Array, errors: Errors) -> None:
        """Takes in a matrix whose codes have all been made; its scales are f32 [row blocks, column blocks]."""
        kind = kind_of(strips.pieces[0].tensor)
        self._scales[strips.pieces] = scales
        self.errors[kind] = self.errors.get(kind, Errors()) + errors.of_tensor(strips.name)

    def scales(self, strips: Strips) -> Array:
        """The scales of a matrix. Where they stand in front of its codes, its weights are read twice."""
        pieces = strips.pieces
        if pieces not in self._scales:
            self._scales[pieces] = np.stack([strips.quantize(index)[1] for index in range(strips.count)])
        return self._scales[pieces]


def kind_of(tensor: str) -> str:
    """What a quantised tensor of a checkpoint belongs to, as reports name it; a draft's are called so by the export."""
    if tensor.startswith(DRAFT):
        return "draft"
    kinds = {".attention.": "attention", ".experts.": "routed experts", ".shared_experts.": "shared experts"}
    return next((kind for part, kind in kinds.items() if part in tensor), "dense MLP")


class CodesRun:
    """The e4m3 codes of one matrix, to be asked for front to back."""

    def __init__(self, strips: Strips, owner: FileQuantizer) -> None:
        self._strips, self._owner = strips, owner
        self._codes = np.empty(0, np.uint8)  # of the last strip
        self._scales: list[Array] = []  # of all strips so far
        self._errors = Errors()
        self.nbytes = strips.size

    def fill(self, view: memoryview, offset: int) -> None:
        """Writes the codes from `offset` on into all of `view`."""
        strips, done = self._strips, 0
        while done < len(view):
            index, skip = divmod(offset + done, strips.block[0] * strips.width)
            if index == len(self._scales):
                self._make(index)
            codes = self._codes[skip : skip + len(view) - done]
            view[done : done + len(codes)] = codes.data
            done += len(codes)

    def _make(self, index: int) -> None:
        codes, scales, errors = self._strips.quantize(index)
        self._codes = codes.reshape(-1)
        self._scales.append(scales)
        self._errors += errors
        if len(self._scales) == self._strips.count:
            self._owner.finish(self._strips, np.stack(self._scales), self._errors)


class ScalesRun:
    """The f32 scales of one matrix."""

    def __init__(self, strips: Strips, owner: FileQuantizer) -> None:
        self._strips, self._owner = strips, owner
        self.nbytes = strips.count * -(-strips.width // strips.block[1]) * 4

    def fill(self, view: memoryview, offset: int) -> None:
        """Writes the bytes from `offset` on into all of `view`."""
        data = self._owner.scales(self._strips).view(np.uint8).reshape(-1)
        view[:] = data[offset : offset + len(view)].data
