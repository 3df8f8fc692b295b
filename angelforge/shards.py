"""The tensor headers of a folder of safetensors: one file, or shards with their index. Reads no tensor data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath

from angelforge.config_json import Section, read_json_object
from angelforge.errors import AngelForgeError
from angelforge.tensorfile import TensorFile, TensorInfo, read_tensor_file

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_EXAMPLES = 3  # names shown of each kind of problem


def open_tensors(folder: Path, keep: Callable[[str], bool]) -> dict[str, TensorInfo]:
    """All tensors of the files in `folder` that hold a tensor for which `keep` is true, by name.

    Files with only other tensors may be absent. Raises AngelForgeError when there are no safetensors, when a header is
    malformed, or when the index and the files disagree.
    """
    index, single = folder / INDEX, folder / SINGLE
    if index.exists() and single.exists():
        raise AngelForgeError(f"{folder} holds both {SINGLE} and {INDEX}: remove the one that is out of date.")
    if single.exists():
        return dict(read_tensor_file(single).tensors)
    if not index.exists():
        raise AngelForgeError(_explain_absence(folder))
    weight_map = _read_index(index)
    names = list(dict.fromkeys(file for name, file in weight_map.items() if keep(name)))
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise AngelForgeError(
            f"{index} names {len(absent)} of {len(names)} files that are not there: {listed(absent)}. "
            "The checkpoint is incomplete: fetch it again."
        )
    files = {name: read_tensor_file(folder / name) for name in names}
    return _merge(index, weight_map, files, keep)


def listed(names: list[str]) -> str:
    """The first few names and how many more there are."""
    more = f" and {len(names) - _EXAMPLES} more" if len(names) > _EXAMPLES else ""
    return ", ".join(names[:_EXAMPLES]) + more


def _read_index(path: Path) -> Mapping[str, str]:
    """Tensor name → file name, every file name a relative path that stays inside the folder."""
    block = Section(read_json_object(path), str(path)).section("weight_map")
    if block is None or not block.raw:
        raise AngelForgeError(f"{path}: weight_map is missing or empty, but it must name the file of every tensor.")
    for name in block.raw:
        block.text(name)
    for file in dict.fromkeys(block.raw.values()):
        # Links may leave the folder (the Hub's cache is made of them); names in the index may not.
        outside = PurePosixPath(file).is_absolute() or ".." in file.split("/") or "\\" in file
        if outside or not file.isprintable() or not file.endswith(".safetensors"):
            raise AngelForgeError(
                f"{path} names the file {file!r}, but only .safetensors files inside its own folder are allowed."
            )
    return block.raw


def _merge(
    index: Path, weight_map: Mapping[str, str], files: Mapping[str, TensorFile], keep: Callable[[str], bool]
) -> dict[str, TensorInfo]:
    merged: dict[str, TensorInfo] = {}
    twice: list[str] = []
    unlisted: list[str] = []
    for file in files.values():
        for name, info in file.tensors.items():
            if name in merged:
                twice.append(f"{name} in {merged[name].path.name} and {file.path.name}")
            if name not in weight_map:
                unlisted.append(f"{name} in {file.path.name}")
            merged[name] = info
    lost = [
        f"{name} in {file}"
        for name, file in weight_map.items()
        if file in files and keep(name) and name not in files[file].tensors
    ]
    kinds = {"stand in two files": twice, "are not in the file the index says": lost, "are not in the index": unlisted}
    problems = [f"{len(names)} tensors {kind} ({listed(names)})" for kind, names in kinds.items() if names]
    if problems:
        raise AngelForgeError(
            f"{index} and its files disagree: {'; '.join(problems)}. Fetch the checkpoint again, all of one version."
        )
    return merged


def _explain_absence(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    if shards := [name for name in names if name.endswith(".safetensors")]:
        return f"{folder} holds {listed(shards)}, but neither {SINGLE} nor {INDEX}: fetch the index too."
    if others := [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]:
        return (
            f"{folder} holds weights only as {listed(others)}, a format that can run code when it is read. "
            "AngelForge reads safetensors only: convert them (Transformers: save_pretrained) or fetch the safetensors."
        )
    return f"{folder} holds no weights: neither {SINGLE} nor {INDEX} is there. Is it the checkpoint's folder?"
