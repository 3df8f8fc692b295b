"""Reads Hugging Face checkpoint folders for the reference model, without the product's readers."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from angelforge.diskerrors import explained
from angelforge.errors import AngelForgeError

Array = NDArray[Any]

_TYPES: dict[str, Any] = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "I64": np.int64,
    "BOOL": np.bool_,
}


def checkpoint_config(folder: Path) -> dict[str, Any]:
    """config.json as it stands."""
    path = folder / "config.json"
    try:
        with explained("read", path):
            config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AngelForgeError(f"{path} is not JSON: {error}.") from error
    if not isinstance(config, dict):
        raise AngelForgeError(f"{path} holds no JSON object.")
    return config


def checkpoint_tensors(folder: Path) -> Callable[[str], Array]:
    """A function from a tensor's name to its array, read when asked for; quantised weights come dequantised, f32.

    Raises, and the function too, AngelForgeError where a file is damaged or a tensor is missing.
    """
    found: dict[str, tuple[Path, Any, list[int], int, int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.update({name: (path, *place) for name, place in _places(path).items()})

    def read(name: str) -> Array:
        if name not in found:
            raise AngelForgeError(
                f"The reference's checkpoint {folder} has no tensor {name}. Is it the bundle's model?"
            )
        path, dtype, shape, begin, end = found[name]
        with explained("read", path), path.open("rb") as file:
            file.seek(begin)
            data = file.read(end - begin)
        if len(data) != end - begin:
            raise AngelForgeError(f"{path} ends inside tensor {name}; the checkpoint is damaged. Fetch it again.")
        return np.frombuffer(data, dtype).reshape(shape)

    def tensor(name: str) -> Array:
        scale = name + "_scale_inv"
        return dequantise(read(name), read(scale)) if scale in found else read(name)

    return tensor


def as_packed(tensors: Callable[[str], Array], quantized: bool) -> Callable[[str], Array]:
    """The same tensors as a bundle in bf16 holds them: rounded to it, but for the router's, which stay as they are.

    With `quantized` as one in FP8 does: what it quantises is left alone.
    """

    def tensor(name: str) -> Array:
        kept = name.endswith((".mlp.gate.weight", ".mlp.gate.expert_bias")) or (quantized and is_quantised(name))
        return tensors(name) if kept else tensors(name).astype(ml_dtypes.bfloat16)

    return tensor


def is_quantised(name: str) -> bool:
    """Whether FP8 checkpoints quantise this weight."""
    return name.endswith(("_proj.weight", "attention.query_key_value.weight", "attention.dense.weight"))


def _places(path: Path) -> dict[str, tuple[Any, list[int], int, int]]:
    """Type, shape, begin and end of every tensor of a file."""
    try:
        with explained("read", path), path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        return {
            name: (_TYPES[entry["dtype"]], entry["shape"], *(8 + length + offset for offset in entry["data_offsets"]))
            for name, entry in header.items()
        }
    except (struct.error, ValueError, KeyError, AttributeError, TypeError) as error:
        raise AngelForgeError(f"{path} is no safetensors file that the reference can read: {error!r}.") from error


def read_safetensors(path: Path) -> dict[str, Array]:
    """Every tensor of one file, in memory."""
    data = path.read_bytes()
    return {
        name: np.frombuffer(data[begin:end], dtype).reshape(shape)
        for name, (dtype, shape, begin, end) in _places(path).items()
    }


def dequantise(weight: Array, scale: Array) -> Array:
    """weight × scale in f32; scale [⌈out/128⌉, ⌈in/128⌉] holds one factor for each 128×128 block."""
    rows, columns = weight.shape
    spread = np.repeat(np.repeat(scale, 128, axis=0), 128, axis=1)[:rows, :columns]
    return np.asarray(weight.astype(np.float32) * spread)
