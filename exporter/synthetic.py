"""Checkpoints made up on the spot: small random ones that run, and the real model's shape without its bytes.

For the demo, benchmarks and tests. The layout is that of a published Hugging Face checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from angelforge.atomic import write_atomic
from angelforge.config import ModelConfig
from angelforge.diskerrors import explained
from angelforge.dtypes import DType
from angelforge.errors import UsageError
from angelforge.exporter.synthetic_config import FP8_BLOCK, FULL_CONFIG, small_config
from angelforge.exporter.synthetic_tokenizer import ROLE_END, SMALLEST, write_tokenizer
from angelforge.exporter.synthetic_values import Spec, checkpoint_values, tensor_specs
from angelforge.tensorfile import encode_header

__all__ = ["FULL_CONFIG", "small_config", "write_checkpoint", "write_sparse_checkpoint"]

_STORED = {"BF16": DType.BF16, "F32": DType.F32, "F16": DType.F16, "FP8": DType.BF16}
_TORCH_NAMES = {"BF16": "bfloat16", "F32": "float32", "F16": "float16", "FP8": "bfloat16"}
_MARK = ".synthetic"  # a folder with this file may be written over
_SHARD_BYTES = 5_000_000_000  # published checkpoints are cut into files of at most so much


def write_checkpoint(
    folder: str | Path,
    config: Mapping[str, Any],
    *,
    seed: int = 0,
    dtype: Literal["BF16", "F32", "F16", "FP8"] = "BF16",
    bias_dtype: Literal["BF16", "F32", "F16"] = "F32",
    shards: int = 2,
    tokenizer: bool = True,
) -> Path:
    """Writes a random checkpoint of `config` (a config.json, such as `small_config()`) and returns its folder.

    Values depend on `seed` alone: two types of the same seed differ by rounding only. `bias_dtype` is the stored type
    of the router's expert_bias. One shard is `model.safetensors`, more come with an index. No more than one tensor is
    held in memory. `tokenizer` adds a byte-level BPE tokenizer and a chat template. Raises UsageError for a vocabulary
    too small for the tokenizer, for fewer than one shard or a folder of other files, AngelForgeError when the folder
    cannot be written.
    """
    folder = Path(folder)
    if shards < 1:
        raise UsageError(f"A checkpoint cannot have {shards} shards; ask for at least one.")
    content = _config_content(config, dtype)
    model = ModelConfig.from_dict(content)
    specs = tensor_specs(model, _STORED[dtype], DType(bias_dtype))
    if tokenizer and model.vocab_size < SMALLEST:
        raise UsageError(
            f"A vocabulary of {model.vocab_size} ids cannot hold the tokenizer's {SMALLEST}; "
            "use a larger vocab_size or leave the tokenizer out."
        )
    files = _split(specs, shards)
    _prepare(folder)
    values = checkpoint_values(specs, seed)
    for name, part in files.items():
        with explained("write", folder / name), (folder / name).open("wb") as file:
            file.write(_header(part))
            for array in islice(values, len(part)):
                file.write(array.view(np.uint8).data)
    _write_index(folder, files)
    if tokenizer:
        write_tokenizer(folder, model.vocab_size, model.max_context)
    ends = (*model.eos_token_ids, ROLE_END) if tokenizer else model.eos_token_ids
    _write_config(folder, content, ends)
    return folder


def write_sparse_checkpoint(folder: str | Path, config: Mapping[str, Any] = FULL_CONFIG, *, fp8: bool = False) -> Path:
    """Writes a checkpoint of `config` with true headers and sizes whose values are holes, and returns its folder.

    The files are cut at 5 GB as published ones are (42 for AntAngelMed in BF16) and take up almost no disk: every
    value reads as zero. Raises AngelForgeError when the folder cannot be written or has no room for such file sizes.
    """
    folder = Path(folder)
    content = _config_content(config, "FP8" if fp8 else "BF16")
    model = ModelConfig.from_dict(content)
    specs = tensor_specs(model, DType.BF16, DType.F32)
    total = sum(spec.nbytes for spec in specs)
    files = _split(specs, -(-total // _SHARD_BYTES))
    _prepare(folder)
    for name, part in files.items():
        header = _header(part)
        with explained("write", folder / name), (folder / name).open("wb") as file:
            file.write(header)
            file.truncate(len(header) + sum(spec.nbytes for spec in part))
    _write_index(folder, files)
    _write_config(folder, content, model.eos_token_ids)
    return folder


def _split(specs: Sequence[Spec], shards: int) -> dict[str, list[Spec]]:
    """File name → its tensors, in order: `shards` files of nearly equal size, none of them empty."""
    shards = min(shards, len(specs))
    share = sum(spec.nbytes for spec in specs) / shards
    parts: list[list[Spec]] = [[]]
    before = 0
    for index, spec in enumerate(specs):
        missing = shards - len(parts)
        full = before + spec.nbytes / 2 > share * len(parts) or len(specs) - index == missing
        if parts[-1] and missing and full:
            parts.append([])
        parts[-1].append(spec)
        before += spec.nbytes
    if shards == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{i:05}-of-{shards:05}.safetensors": part for i, part in enumerate(parts, 1)}


def _header(specs: Sequence[Spec]) -> bytes:
    # 8 as the usual writers do: readers must not count on pages.
    return encode_header([(spec.name, spec.dtype, spec.shape) for spec in specs], {"format": "pt"}, align=8)


def _prepare(folder: Path) -> None:
    """An empty place for the checkpoint: weights of an earlier one would be read as part of this one.

    Only what this module wrote is removed; raises UsageError for a folder that holds other files.
    """
    with explained("create", folder):
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()) and not (folder / _MARK).exists():
            raise UsageError(f"{folder} holds files that are not a synthetic checkpoint's. Name a new or empty folder.")
        (folder / _MARK).touch()
        for pattern in ("config.json", "model*.safetensors", "model.safetensors.index.json"):
            for old in folder.glob(pattern):
                old.unlink()


def _write_index(folder: Path, files: Mapping[str, Sequence[Spec]]) -> None:
    if len(files) == 1:
        return
    total = sum(spec.nbytes for part in files.values() for spec in part)
    weight_map = {spec.name: name for name, part in files.items() for spec in part}
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _config_content(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    quantisation = {"quantization_config": FP8_BLOCK} if dtype == "FP8" else {}
    return {**config, "torch_dtype": _TORCH_NAMES[dtype], **quantisation}


def _write_config(folder: Path, content: Mapping[str, Any], ends: Sequence[int]) -> None:
    """generation_config.json and config.json; last, so that a folder with a config is a whole checkpoint."""
    generation = {"eos_token_id": sorted(set(ends)), "pad_token_id": content.get("pad_token_id")}
    write_json(folder / "generation_config.json", generation)
    write_json(folder / "config.json", content)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file as Hugging Face tools do, whole or not at all."""
    write_atomic(path, json.dumps(content, indent=2) + "\n")
