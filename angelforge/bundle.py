"""A bundle on disk: opened by comparing names, sizes and headers; verified by hashing every byte."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from angelforge.diskerrors import explained, require_utf8
from angelforge.errors import AngelForgeError
from angelforge.manifest import FILE, FORMAT, WEIGHTS, FileRecord, Manifest
from angelforge.parallel import run_all
from angelforge.tensorfile import TensorInfo, read_tensor_file

__all__ = ["FILE", "FORMAT", "WEIGHTS", "Bundle", "FileRecord", "Manifest", "record_file"]

_CHUNK = 4 << 20  # bytes read at a time while hashing
_SHOWN = 3  # mismatches told in one message
_AGAIN = "Export the bundle again; what is intact is kept."


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. `tensors` are the weights by name, empty where they are absent."""

    folder: Path
    manifest: Manifest
    tensors: Mapping[str, TensorInfo]

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Opens the bundle in folder `path` after comparing it with its manifest.

        Looks at names, sizes and the headers of the weights, so it takes milliseconds for any size; `verify` reads
        every byte. Raises AngelForgeError: no bundle, a bad manifest, a file that is missing or differs.
        """
        folder = Path(path)
        require_utf8(folder)
        manifest = Manifest.read(folder)
        problems = [text for name, record in manifest.files.items() if (text := _difference(folder, name, record))]
        _refuse(folder, problems)
        tensors: dict[str, TensorInfo] = {}
        for name, record in manifest.files.items():
            if record.header_sha256 is None:
                continue
            file = read_tensor_file(folder / name)
            if file.header_sha256 != record.header_sha256:
                problems.append(f"the header of {name} is not the one that was exported")
            tensors |= file.tensors
        _refuse(folder, problems)
        embedding = tensors.get("model.word_embeddings.weight")
        if manifest.model.tie_word_embeddings and embedding is not None:
            tensors["lm_head.weight"] = dataclasses.replace(embedding, name="lm_head.weight")
        return cls(folder, manifest, MappingProxyType(tensors))

    @property
    def weights_present(self) -> bool:
        """Whether the weights have been packed."""
        return self.manifest.weights == "packed"

    def require_weights(self) -> None:
        """Raises AngelForgeError where only the graph was exported."""
        if not self.weights_present:
            raise AngelForgeError(
                f"The bundle {self.folder} holds the graph but no weights (it was exported with --graph-only). "
                f"Add them with: angelforge export CHECKPOINT {self.folder}"
            )

    def verify(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Compares the sha256 of every file with the manifest; `progress` gets bytes done and bytes in all.

        Raises AngelForgeError naming the files that differ.
        """
        files = self.manifest.files
        total = sum(record.size for record in files.values())
        done, guard, stop = [0], threading.Lock(), threading.Event()

        def advance(count: int) -> None:
            with guard:
                done[0] += count
            if stop.is_set():
                raise CancelledError

        def watch() -> None:
            if progress is not None:
                progress(done[0], total)

        tasks = [lambda path=self.folder / name: _sha256(path, advance) for name in files]
        found = dict(zip(files, run_all(tasks, min(4, os.cpu_count() or 1), stop, watch), strict=True))
        differing = [name for name, record in files.items() if found[name] != record.sha256]
        if differing:
            raise AngelForgeError(
                f"{len(differing)} of {len(files)} files of {self.folder} are damaged: their sha256 is not the one in "
                f"{FILE}: {_shown(differing)}. Delete them and export the bundle again; the others are kept."
            )


def record_file(path: Path) -> FileRecord:
    """Size and digests of a finished file, for a manifest; safetensors get the digest of their header too.

    Raises AngelForgeError when it cannot be read.
    """
    header = read_tensor_file(path).header_sha256 if path.suffix == ".safetensors" else None
    with explained("read", path):
        size = path.stat().st_size
    return FileRecord(size, _sha256(path), header)


def _difference(folder: Path, name: str, record: FileRecord) -> str | None:
    try:
        size = (folder / name).stat().st_size
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    return None if size == record.size else f"{name} has {size} bytes, expected {record.size}"


def _refuse(folder: Path, problems: list[str]) -> None:
    if problems:
        raise AngelForgeError(f"The bundle {folder} does not fit its {FILE}: {_shown(problems, '; ')}. {_AGAIN}")


def _shown(items: list[str], separator: str = ", ") -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return separator.join(items[:_SHOWN]) + more


def _sha256(path: Path, advance: Callable[[int], None] = lambda count: None) -> str:
    digest = hashlib.sha256()
    buffer = bytearray(_CHUNK)
    with explained("read", path), path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
            advance(count)
    return digest.hexdigest()
