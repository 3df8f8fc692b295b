"""Where every tensor of a bundle stands: a weight file for each layer, offsets from names, types and shapes alone."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from angelforge.exporter.pieces import DRAFT, BundleTensor, SameBytes
from angelforge.tensorfile import encode_header

_PAGE = 4096  # bytes; the data of a file begins at a multiple of it
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_HEAD = ("model.norm.", "lm_head.")


@dataclass(frozen=True)
class Location:
    """Where a tensor's bytes stand: a file relative to the bundle, offset and length in bytes."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class Shard:
    """One weight file: `file` is relative to the bundle, the tensors follow `header` back to back."""

    file: str
    tensors: tuple[BundleTensor, ...]
    header: bytes

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)

    @property
    def header_sha256(self) -> str:
        """Digest of the header as `angelforge.tensorfile.TensorFile` gives it."""
        return hashlib.sha256(self.header).hexdigest()


def plan_shards(tensors: Iterable[BundleTensor]) -> list[Shard]:
    """Distributes `tensors` over the weight files: embeddings, one for each layer, head, draft.

    In a file those that fill whole pages come first and so are aligned to pages; the others follow by item size,
    aligned to their items; larger ones first. Depends on names, types and shapes alone.
    """
    files: dict[str, list[BundleTensor]] = {}
    for tensor in tensors:
        if not isinstance(tensor.source, SameBytes):
            files.setdefault(_file_of(tensor.name), []).append(tensor)
    return [_shard(file, members) for file, members in files.items()]


def locate(tensors: Iterable[BundleTensor], shards: Sequence[Shard]) -> dict[str, Location]:
    """The place of every tensor by name; one that shares another's bytes is found there."""
    found: dict[str, Location] = {}
    for shard in shards:
        offset = len(shard.header)
        for tensor in shard.tensors:
            found[tensor.name] = Location(shard.file, offset, tensor.nbytes)
            offset += tensor.nbytes
    shared = {tensor.name: tensor.source.tensor for tensor in tensors if isinstance(tensor.source, SameBytes)}
    return found | {name: found[other] for name, other in shared.items()}


def _file_of(name: str) -> str:
    if name.startswith(DRAFT):
        return "weights/draft.safetensors"
    if match := _LAYER.match(name):
        return f"weights/layer-{int(match[1]):03d}.safetensors"
    return f"weights/{'head' if name.startswith(_HEAD) else 'embeddings'}.safetensors"


def _shard(file: str, members: Sequence[BundleTensor]) -> Shard:
    ordered = tuple(sorted(members, key=_order))
    return Shard(file, ordered, encode_header([(t.name, t.dtype, t.shape) for t in ordered], {}))


def _order(tensor: BundleTensor) -> tuple[int, int, int]:
    broken_page = tensor.nbytes % _PAGE != 0
    return (broken_page, -tensor.dtype.itemsize if broken_page else 0, -tensor.nbytes)
