"""The folder that an export writes to: nobody's files but a bundle's, and never a bundle that is half of two."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from angelforge.diskerrors import explained, require_utf8
from angelforge.errors import AngelForgeError, UsageError
from angelforge.manifest import FILE, Manifest

LOCK = ".export.lock"
_MARKS = (FILE, LOCK, "weights")  # what a finished or interrupted export leaves


def check_destination(folder: Path, graph_only: bool) -> None:
    """Raises UsageError for a folder that holds something else, or weights that an export of the graph would disown."""
    require_utf8(folder)
    with explained("read", folder):
        names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if "config.json" in names:
        raise UsageError(f"{folder} is a checkpoint; a bundle needs a folder of its own.")
    if names and not names.intersection(_MARKS):
        raise UsageError(f"{folder} holds other files and no bundle. Name a new or empty folder.")
    if graph_only and FILE in names and Manifest.read(folder).weights == "packed":
        raise UsageError(
            f"The bundle {folder} has its weights already; its graph alone cannot be exported again. "
            "Leave --graph-only out, or name another folder."
        )


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """Makes the folder of a bundle. Where the work in it fails before anything was finished, it is removed again."""
    new = not folder.exists()
    with explained("create", folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except AngelForgeError:
        for each in (folder / "weights", folder) if new else ():
            with suppress(OSError):  # it is not empty: a later call goes on from what it holds
                each.rmdir()
        raise


def withdraw(folder: Path) -> None:
    """Takes the manifest away before files change: an interrupted export must never be taken for a bundle."""
    with explained("remove", folder / FILE):
        (folder / FILE).unlink(missing_ok=True)
