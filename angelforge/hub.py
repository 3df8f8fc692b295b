"""Finds a checkpoint: a folder on this machine, or a model of the Hugging Face Hub that is downloaded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from angelforge.diskerrors import explained
from angelforge.errors import AngelForgeError

CONFIG_FILES = ("config.json", "generation_config.json")
# No *.py: nothing of a checkpoint is ever run.
CHECKPOINT_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.txt", "LICENSE*")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def locate(source: str | Path, files: Sequence[str] = CHECKPOINT_FILES) -> Path:
    """The folder of a checkpoint; `source` is its path or a Hub id such as ``org/name``.

    A Hub id that is no folder here is downloaded into the Hub's own cache, restricted to `files` (patterns). Raises
    AngelForgeError saying what to do when there is neither.
    """
    if not str(source):
        raise AngelForgeError("There is no folder of an empty name. Give a checkpoint's folder or a Hub id.")
    path = Path(source)
    with explained("read", path):
        if path.is_dir():
            return path
        if path.exists():
            raise AngelForgeError(f"{path} is a file, but the checkpoint's folder is needed: {path.parent}.")
    if _HUB_ID.fullmatch(str(source)):
        return _download(str(source), files)
    raise AngelForgeError(f"There is no folder {path}. Give a checkpoint's folder or a Hub id (organisation/name).")


def _download(repository: str, files: Sequence[str]) -> Path:
    # Imported here: it takes half a second, and most checkpoints are folders.
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=list(files)))
    except _failures() as error:
        raise AngelForgeError(_explain(repository, error)) from None


def _failures() -> tuple[type[BaseException], ...]:
    """What a download may raise, in every supported version of huggingface_hub (requests, then httpx inside)."""
    from huggingface_hub import errors

    names = ("HTTPError", "EntryNotFoundError", "XetDownloadError")
    found: list[Any] = [getattr(errors, name) for name in names if hasattr(errors, name)]
    return (OSError, ValueError, RuntimeError, *found)


def _explain(repository: str, error: BaseException) -> str:
    cause = (str(error).strip().splitlines() or [""])[0][:200].rstrip(". ")
    kind = type(error).__name__
    if kind == "GatedRepoError":
        advice = "Accept its terms on its page and run `hf auth login`, then try again."
    elif kind == "RepositoryNotFoundError":
        advice = "Check the spelling; for a private model run `hf auth login` first."
    else:
        name = repository.partition("/")[2]
        advice = (
            f"Without network: run `hf download {repository} --local-dir {name}` on a machine that has it, "
            f"copy the folder here and give its path."
        )
    return f"{repository} is no folder here, and downloading it from the Hub failed ({kind}: {cause}). {advice}"
