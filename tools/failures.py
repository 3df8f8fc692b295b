"""What the command line does with errors: a sentence or two, an exit code, and a traceback only when asked for."""

import errno
import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from threading import Timer, current_thread, main_thread
from time import sleep
from types import FrameType
from typing import IO, Any

import click

from angelforge.errors import AngelForgeError, UsageError

FIXES = {
    errno.ENOSPC: "Free some space or choose another disk, then run the same command again.",
    errno.EDQUOT: "The quota is used up: free some space, then run the same command again.",
    errno.EACCES: "Change the permissions or choose another path.",
    errno.EPERM: "Change the permissions or choose another path.",
    errno.EROFS: "Choose a path on a disk that can be written.",
    errno.ENOENT: "Check the path.",
    errno.EISDIR: "Name a file instead.",
    errno.ENOTDIR: "Name a folder instead.",
    errno.EMFILE: "Raise the limit of open files (ulimit -n).",
}

_IMPORT_LASTS = 0.1  # s until an interrupt is looked at again that came while torch was imported
_FIRST_SPEAKS = 3.0  # s that other processes of torchrun wait for the first one to tell an error of all


@dataclass(frozen=True)
class ErrorStyle:
    """How errors are shown: with the traceback before the message, and as JSON on standard output too."""

    debug: bool = False
    as_json: bool = False


class Failure(click.ClickException):
    """An error that is shown as a message and ends the process with exit code 1."""

    prefix = "error: "

    def __init__(self, message: str, as_json: bool) -> None:
        super().__init__(message)
        self.as_json = as_json

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the message to standard error and, where JSON was asked for, as JSON to standard output.

        Of the processes that torchrun starts with the same command line, the first one speaks for all.
        """
        if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("RANK", "0") != "0":
            sleep(_FIRST_SPEAKS)  # torchrun ends all processes once one of them has ended
            return
        self.explain(file)
        if self.as_json:
            with suppress(OSError):  # standard output may be what failed
                click.echo(json.dumps({"error": self.message}))

    def explain(self, file: IO[Any] | None) -> None:
        """Print what people read."""
        click.echo(f"{self.prefix}{self.message}", file=file, err=True)


class Interrupted(Failure):
    """The user pressed Ctrl-C."""

    exit_code = 130
    prefix = ""


class WrongUse(Failure):
    """The request itself was wrong."""

    exit_code = 2


class WrongOptions(WrongUse):
    """The command line did not parse: shown as click shows it, with the usage line of the command."""

    def __init__(self, error: click.UsageError, as_json: bool) -> None:
        super().__init__(error.format_message(), as_json)
        self.error = error

    def explain(self, file: IO[Any] | None) -> None:
        """Print click's own message."""
        self.error.show(file)


def os_error_message(error: OSError) -> str:
    """One or two sentences: which path, what the system said, what to do."""
    what = os.strerror(error.errno).lower() if error.errno else str(error) or type(error).__name__
    paths = [str(path) for path in (error.filename, error.filename2) if path is not None]
    fix = FIXES.get(error.errno or 0, "")
    return f"{' and '.join(paths)}{': ' if paths else ''}{what}.{' ' if fix else ''}{fix}"


def import_error_message(error: ImportError) -> str | None:
    """One or two sentences about a package that is missing or cannot be loaded; None where one of our modules is."""
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("angelforge"):
        return (
            f"the Python package {error.name!r} is missing. `angelforge doctor` says what is missing in {sys.prefix} "
            f"and how to install it."
        )
    if error.path and not error.path.endswith(".py"):  # a compiled module whose libraries do not load
        return f"{error.path} cannot be loaded: {error}. Install the package again; `angelforge doctor` checks all."
    return None


def _is_being_imported(name: str) -> bool:
    """Whether Python is at work on the import of package `name`."""
    return bool(getattr(getattr(sys.modules.get(name), "__spec__", None), "_initializing", False))


@contextmanager
def _noticing(interrupts: list[int]) -> Iterator[None]:
    """Notes every Ctrl-C in `interrupts`; otherwise Python's own handler does what it does, once torch is loaded."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler or current_thread() is not main_thread():
        yield
        return

    again: list[Timer] = []  # the next look, one however often Ctrl-C is pressed meanwhile

    def repeat(number: int) -> None:
        again.clear()
        os.kill(os.getpid(), number)

    def note(number: int, frame: FrameType | None) -> None:
        interrupts.append(number)
        if _is_being_imported("torch"):  # its C++ parts end the process at once when Python raises among them
            if not again:
                again.append(Timer(_IMPORT_LASTS, repeat, (number,)))
                again[0].daemon = True
                again[0].start()
            return
        for look in again:
            look.cancel()
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        for look in again:
            look.cancel()
        if signal.getsignal(signal.SIGINT) is note:  # a server that was told to end listens to no more
            signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def failures_as_messages(style: ErrorStyle) -> Iterator[None]:
    """Turn the errors that users can meet into `Failure`s. What is left (a bug) keeps its traceback.

    Exit codes: 2 for wrong use, 130 after an interrupt, 1 for everything else.
    """

    def failure(message: str, kind: type[Failure] = Failure) -> Failure:
        if style.debug:
            traceback.print_exc()
        return kind(message, style.as_json)

    interrupts: list[int] = []
    try:
        with _noticing(interrupts):
            yield
    except click.UsageError as error:
        raise WrongOptions(error, style.as_json) from None
    except UsageError as error:
        raise failure(str(error), WrongUse) from None
    except AngelForgeError as error:
        raise failure(str(error)) from None
    except (KeyboardInterrupt, click.Abort):
        raise failure("interrupted", Interrupted) from None
    except BrokenPipeError:
        raise  # the reader (`| head`) has gone: click ends quietly
    except OSError as error:
        raise failure(os_error_message(error)) from None
    except MemoryError as error:
        told = f" ({error})" if str(error) else ""
        raise failure(f"out of memory{told}. Free memory or take a smaller model, batch or context.") from None
    except ImportError as error:
        if interrupts:  # a C extension that is interrupted while it is imported raises this instead
            raise failure("interrupted", Interrupted) from None
        if (message := import_error_message(error)) is None:
            raise
        raise failure(message) from None
