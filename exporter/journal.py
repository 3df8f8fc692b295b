"""Which weight files of a bundle are finished and from what: lets a killed packing go on where it was."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from angelforge.atomic import write_atomic
from angelforge.checkpoint import Checkpoint
from angelforge.config_json import Section, read_json_object
from angelforge.diskerrors import explained
from angelforge.errors import AngelForgeError
from angelforge.exporter.layout import SCALE, Shard
from angelforge.exporter.pieces import BundleTensor
from angelforge.exporter.quantization_errors import Errors
from angelforge.manifest import FileRecord
from angelforge.tensorfile import TensorInfo

JOURNAL = "weights/.packed.json"
_FILE = re.compile(r"weights/[\w-]+\.safetensors")  # never a path out of the folder: these files are removed
_VERSION = 3  # of the journal and of everything that decides a weight file's bytes, or whether there is one


@dataclass(frozen=True)
class PackedShard:
    """A finished weight file: `file` relative to the bundle, `size` in bytes, digests of the file and its header."""

    file: str
    size: int
    sha256: str
    header_sha256: str
    errors: Mapping[str, Errors] = field(default_factory=dict)  # by kind, where weights were quantised

    @property
    def record(self) -> FileRecord:
        """What a bundle's manifest holds of it."""
        return FileRecord(self.size, self.sha256, self.header_sha256)


@dataclass(frozen=True)
class _Entry:
    origin: str  # digest of layout and sources
    mtime_ns: int  # of the finished file
    packed: PackedShard


def origin_digest(shard: Shard, checkpoint: Checkpoint) -> str:
    """Identifies what `shard` is made of: its layout, and place, size and modification time of every source.

    Raises AngelForgeError when a source file is gone.
    """
    digest = hashlib.sha256(f"{_VERSION}\n".encode() + shard.header)
    stats: dict[Path, str] = {}
    for tensor in shard.tensors:
        digest.update(f"{tensor.name} {tensor.source}\n".encode())
        for info in sources(tensor, checkpoint):
            if info.path not in stats:
                with explained("read", info.path):
                    status = info.path.stat()
                stats[info.path] = f"{info.path.name} {status.st_size} {status.st_mtime_ns}"
            digest.update(f"{info.name} {info.dtype.value} {info.shape} {info.offset} {stats[info.path]}\n".encode())
    return digest.hexdigest()


def sources(tensor: BundleTensor, checkpoint: Checkpoint) -> list[TensorInfo]:
    """The checkpoint tensors that are read for `tensor`, scales of FP8 weights included."""
    names = dict.fromkeys(piece.tensor for piece in tensor.pieces)
    found = checkpoint.tensors
    return [found[name] for base in names for name in (base, base + SCALE) if name in found]


class Journal:
    """The finished weight files of one bundle, shared by threads. The caller holds the lock of the weights folder."""

    def __init__(self, bundle_dir: Path) -> None:
        self._folder = bundle_dir
        self._lock = threading.Lock()
        self._entries = dict(_load(bundle_dir / JOURNAL))

    def finished(self, shard: Shard, origin: str) -> PackedShard | None:
        """The record of `shard` if its file is there, as it was written, and made of the same things."""
        entry = self._entries.get(shard.file)
        if entry is None or entry.origin != origin:
            return None
        try:
            with (self._folder / shard.file).open("rb") as file:
                status = os.fstat(file.fileno())
                header = file.read(len(shard.header))
        except OSError:
            return None  # whatever is in the way shows when the file is written again
        same = status.st_size == shard.size and status.st_mtime_ns == entry.mtime_ns and header == shard.header
        return entry.packed if same else None

    def add(self, shard: Shard, origin: str, sha256: str, errors: Mapping[str, Errors]) -> PackedShard:
        """Records `shard`, whose file has just been put in place."""
        with explained("read", self._folder / shard.file):
            mtime_ns = (self._folder / shard.file).stat().st_mtime_ns
        packed = PackedShard(shard.file, shard.size, sha256, shard.header_sha256, dict(errors))
        with self._lock:
            self._entries[shard.file] = _Entry(origin, mtime_ns, packed)
            self._save()
        return packed

    def remove_all_but(self, keep: Collection[str]) -> list[str]:
        """Removes the recorded files that are not in `keep`, and their records; returns their names."""
        stale = [file for file in self._entries if file not in keep]
        for file in stale:
            with explained("remove", self._folder / file):
                (self._folder / file).unlink(missing_ok=True)
            del self._entries[file]
        if stale:
            self._save()
        return stale

    def _save(self) -> None:
        content = {name: dataclasses.asdict(entry) for name, entry in sorted(self._entries.items())}
        text = json.dumps({"version": _VERSION, "files": content}, indent=1)
        write_atomic(self._folder / JOURNAL, text + "\n")


def _load(path: Path) -> Mapping[str, _Entry]:
    """Entries of a journal; none if it is absent, of another version or damaged: then everything is packed again."""
    if not path.exists():
        return {}
    try:
        journal = Section(read_json_object(path), str(path))
        if journal.integer("version") != _VERSION:
            return {}
        files = Section(journal.get("files"), str(path))
        return {name: _entry(files, name) for name in files.raw if _FILE.fullmatch(name)}
    except AngelForgeError:
        return {}


def _entry(files: Section, name: str) -> _Entry:
    entry = Section(files.get(name), files.source)
    packed = Section(entry.get("packed"), files.source)
    errors = Section(packed.get("errors"), files.source)
    return _Entry(
        entry.text("origin"),
        entry.integer("mtime_ns", most=2**63),
        PackedShard(
            name,
            packed.integer("size", most=2**63),
            packed.text("sha256"),
            packed.text("header_sha256"),
            {kind: Errors.from_saved(Section(errors.get(kind), files.source)) for kind in errors.raw},
        ),
    )
