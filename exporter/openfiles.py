"""Exact positioned reads from source files that are opened once."""

from __future__ import annotations

import os
import threading
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from angelforge.diskerrors import disk_error, explained
from angelforge.errors import AngelForgeError


class OpenFiles:
    """Read-only files by path, shared by threads, closed at the end of the `with` block."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._stack = ExitStack()

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def read(self, path: Path, view: memoryview, offset: int) -> None:
        """Fills `view` with the bytes of `path` from `offset` on.

        Raises AngelForgeError when the file cannot be read or ends too early.
        """
        descriptor = self._descriptor(path)
        done = 0
        while done < len(view):
            try:
                count = os.preadv(descriptor, [view[done:]], offset + done)
            except OSError as error:
                raise disk_error("read", path, error) from error
            if count == 0:
                raise AngelForgeError(
                    f"{path} ends at {offset + done} bytes, but its header promises data up to {offset + len(view)}; "
                    "it was shortened meanwhile. Fetch the file again and repeat the export."
                )
            done += count

    def _descriptor(self, path: Path) -> int:
        with self._lock:
            if path not in self._descriptors:
                with explained("read", path):
                    self._descriptors[path] = os.open(path, os.O_RDONLY)
                self._stack.callback(os.close, self._descriptors[path])
            return self._descriptors[path]
