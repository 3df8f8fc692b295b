"""What the operating system says about files, as sentences a user can act on."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from angelforge.errors import AngelForgeError, UsageError

_ADVICE = {
    errno.ENOSPC: "the disk is full; free some space or choose another folder, then run this again",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another folder, then run this again",
    errno.EFBIG: "the file system (or `ulimit -f`) does not allow a file this large; choose another folder",
    errno.ENOENT: "there is no such file or folder; check the path",
    errno.EACCES: "permission denied; check the owner and mode of the path",
    errno.EPERM: "the operation is not permitted; check the owner and mode of the path",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.EISDIR: "it is a folder, a file was expected",
    errno.ENOTDIR: "a part of the path is a file, a folder was expected",
    errno.EEXIST: "something else is in the way there; move it or choose another path",
    errno.ENAMETOOLONG: "the name is too long for this file system; choose a shorter one",
    errno.EMFILE: "too many files are open; raise `ulimit -n`",
    errno.EIO: "the device reports an input/output error; check the disk",
}


def disk_error(action: str, path: Path, error: OSError) -> AngelForgeError:
    """An AngelForgeError for `error`, met while doing `action` (for example "write") to `path`."""
    fallback = error.strerror or str(error)
    return AngelForgeError(f"Cannot {action} {path}: {_ADVICE.get(error.errno or 0, fallback)}.")


@contextmanager
def explained(action: str, path: Path) -> Iterator[None]:
    """Turns every OSError of the block into the AngelForgeError of `disk_error`."""
    try:
        yield
    except OSError as error:
        raise disk_error(action, path, error) from error


def require_utf8(folder: Path) -> None:
    """Raises UsageError for a folder whose path is not valid UTF-8: the libraries that read models take no other."""
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise UsageError(f"The path {str(folder)!r} is not valid UTF-8, so no engine can read it. Rename it.") from None
