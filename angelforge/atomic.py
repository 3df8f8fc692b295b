"""Files that appear whole or not at all, and locks between processes."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from angelforge.diskerrors import explained
from angelforge.errors import AngelForgeError

_TEMPORARY = re.compile(r"\..+\.tmp-\d+-[0-9a-f]{8}")


def write_atomic(path: Path, data: bytes | str) -> None:
    """Writes `data` (text as UTF-8) so that `path` holds either its old content or all of the new, also after a crash.

    Raises AngelForgeError when the file cannot be written; the old content then stays.
    """
    raw = data.encode() if isinstance(data, str) else data
    with explained("write", path), atomic_file(path) as temporary:
        temporary.write_bytes(raw)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path` to write to; on success it is synced and renamed, on failure removed.

    The block must create the file. Raises AngelForgeError when syncing or renaming fails; errors of the block pass.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    done = False
    try:
        yield temporary
        with explained("write", path):
            _sync(temporary)
            os.replace(temporary, path)
            done = True
            _sync(path.parent)
    finally:
        if not done:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> list[Path]:
    """Removes the temporary files that killed processes left in `folder` and returns them.

    Only for a folder whose lock the caller holds: a living writer's file looks the same.
    """
    found = [p for p in folder.iterdir() if _TEMPORARY.fullmatch(p.name)] if folder.is_dir() else []
    for path in found:
        with explained("remove", path):
            path.unlink(missing_ok=True)
    return found


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on the file `path` (created, and removed at the end); a killed process leaves no lock.

    Raises AngelForgeError naming the other process when the lock is taken.
    """
    descriptor = _acquire(path)
    try:
        with suppress(OSError):  # on a full disk the lock holds all the same, only its holder stays unnamed
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # while still locked: whoever opened this file meanwhile notices in _acquire
        os.close(descriptor)


def _acquire(path: Path) -> int:
    while True:
        with explained("lock", path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 20, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(descriptor)
            raise AngelForgeError(
                f"{path.parent} is in use by another process (pid {holder}); wait until it has finished or end it."
            ) from None
        except OSError as error:
            os.close(descriptor)
            raise AngelForgeError(f"Cannot lock {path}: {error.strerror}; choose a folder on a local disk.") from error
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        os.close(descriptor)  # its holder removed this file between our open and flock: lock the present one


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
