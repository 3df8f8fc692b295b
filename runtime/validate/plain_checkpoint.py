"""Reads Hugging Face checkpoint folders for the reference model, without any of the product's code."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

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
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


def checkpoint_tensors(folder: Path) -> Callable[[str], Array]:
    """A function from a tensor's name to its array; quantised weights come dequantised, f32."""
    found: dict[str, Array] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.update(read_safetensors(path))

    def tensor(name: str) -> Array:
        scale = found.get(name + "_scale_inv")
        return found[name] if scale is None else dequantise(found[name], scale)

    return tensor


def read_safetensors(path: Path) -> dict[str, Array]:
    """Every tensor of one file, mapped into memory."""
    data = np.memmap(path, np.uint8, "r")
    (length,) = struct.unpack("<Q", data[:8].tobytes())
    header = json.loads(data[8 : 8 + length].tobytes())
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        tensors[name] = np.frombuffer(data[begin:end].tobytes(), _TYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def dequantise(weight: Array, scale: Array) -> Array:
    """weight × scale in f32; scale [⌈out/128⌉, ⌈in/128⌉] holds one factor for each 128×128 block."""
    rows, columns = weight.shape
    spread = np.repeat(np.repeat(scale, 128, axis=0), 128, axis=1)[:rows, :columns]
    return np.asarray(weight.astype(np.float32) * spread)
