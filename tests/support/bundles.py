"""What the weight files of a bundle must hold, computed from the checkpoint's files without the product's packer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from angelforge.bundle import Bundle
from angelforge.runtime.validate.plain_checkpoint import read_safetensors
from angelforge.tensorfile import read_tensor

Array = NDArray[Any]


def wrong_weight(bundle: Bundle, name: str, factor: float = 1.5) -> None:
    """Damages one row of a weight [N, K] in a bundle's own file, f32 or bf16."""
    info = bundle.tensors[name]
    array = read_tensor(info)
    array[1] = (array[1].astype(np.float32) * factor).astype(array.dtype)
    with info.path.open("r+b") as file:
        file.seek(info.offset)
        file.write(array.tobytes())


def folder_tensors(folder: Path) -> dict[str, Array]:
    """Every tensor of every safetensors file of a folder."""
    found: dict[str, Array] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= read_safetensors(path)
    return found


def expected_weight(name: str, source: dict[str, Array], num_experts: int, shared: int, fp8: bool) -> Array:
    """The values of a bundle tensor: f64 where they are to be rounded to its type, e4m3 and scales as they are."""
    if ".mlp.experts." not in name:
        return _plain(name, source, fp8)
    prefix, _, suffix = name.partition(".experts.")
    stack = [_plain(f"{prefix}.experts.{expert}.{suffix}", source, fp8) for expert in range(num_experts)]
    if shared:
        whole = _plain(f"{prefix}.shared_experts.{suffix}", source, fp8)
        stack += np.split(whole, shared, axis=1 if suffix.startswith("down_proj") else 0)
    return np.stack(stack)


def _plain(name: str, source: dict[str, Array], fp8: bool) -> Array:
    values, scale = source[name], source.get(name + "_scale_inv")
    if fp8 and (scale is not None or name.endswith("_scale_inv")):
        return values
    if scale is None:
        return values.astype(np.float64)
    rows, columns = values.shape
    spread = np.repeat(np.repeat(scale, 128, axis=0), 128, axis=1)[:rows, :columns]
    return np.asarray(values.astype(np.float64) * spread)


def rounded(values: Array, dtype: np.dtype[Any]) -> Array:
    """f64 values rounded once, to nearest even, to f32 or bf16 (8 significant bits; no subnormals)."""
    if dtype != ml_dtypes.bfloat16 or values.dtype != np.float64:
        return values.astype(dtype)
    mantissa, exponent = np.frexp(values)
    return np.ldexp(np.rint(np.ldexp(mantissa, 8)), exponent - 8).astype(dtype)


def same_bits(left: Iterable[Array], right: Iterable[Array]) -> bool:
    """Whether arrays agree in type, shape and every bit."""
    return all(
        a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
        for a, b in zip(left, right, strict=True)
    )
