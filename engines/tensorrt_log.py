"""TensorRT's messages: the full log of a build in a file, and its errors for an explanation."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from threading import Lock
from time import perf_counter
from typing import Any, TextIO

from angelforge.diskerrors import explained
from angelforge.errors import AngelForgeError
from angelforge.plugins.tensorrt.library import Library

_ERRORS = ("INTERNAL_ERROR", "ERROR")
_KEPT = 20  # errors of engines at work; they are told with the call that fails


@dataclass
class BuildLog:
    """What TensorRT said during one build. TensorRT may speak from several threads."""

    file: TextIO
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    begin: float = field(default_factory=perf_counter)
    guard: Lock = field(default_factory=Lock)

    def write(self, severity: str, message: str) -> None:
        """Notes one message; `severity` is a name of ILogger.Severity."""
        with self.guard:
            if severity in _ERRORS:
                self.errors.append(message)
            elif severity == "WARNING":
                self.warnings.append(message)
            # An exception here would end the process inside TensorRT: a log that cannot grow is left as it is.
            with suppress(OSError, ValueError):
                self.file.write(f"{perf_counter() - self.begin:9.3f} {severity} {message}\n")


class _Logger:
    """The one ILogger of a process: TensorRT keeps the first it is given, whatever comes later."""

    api: Any
    log_to: BuildLog | None

    def __init__(self) -> None:
        self.api.ILogger.__init__(self)
        self.log_to = None
        self.run_errors: deque[str] = deque(maxlen=_KEPT)  # while no build is recorded: the latest

    def log(self, severity: Any, message: str) -> None:
        """Called by TensorRT."""
        if (target := self.log_to) is not None:
            target.write(severity.name, message)
        elif severity.name in _ERRORS:
            self.run_errors.append(message)


@cache
def logger_of(library: Library) -> Any:
    """The ILogger to be given to builders, parsers and runtimes of this library."""
    return type("AngelForgeLogger", (_Logger, library.api.ILogger), {"api": library.api})()


@contextmanager
def recording(library: Library, path: Path) -> Iterator[BuildLog]:
    """Writes all of TensorRT's messages to the file `path` (replaced) until the block ends.

    Raises:
        AngelForgeError: the file cannot be written, or this process records another build.
    """
    logger = logger_of(library)
    if logger.log_to is not None:
        raise AngelForgeError("This process is building another engine; wait until it has finished.")
    with explained("write", path):
        file = path.open("w", encoding="utf-8", errors="replace", buffering=1)
    logger.log_to = BuildLog(file)
    try:
        yield logger.log_to
    finally:
        logger.log_to = None
        with suppress(OSError):
            file.close()
