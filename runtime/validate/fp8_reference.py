"""The reference in FP8: weights in blocks (MODEL.md), activations by token and 128 channels (DESIGN.md, Precision).

Like `reference` it shares no code with the product. Only rounding to e4m3 is that of the graph; everything between is
computed in the type of the reference, so that what differs is what a graph does wrong, or a value so close to the
middle of two e4m3 values that summation decides its rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from angelforge.runtime.validate.plain_checkpoint import checkpoint_config, checkpoint_tensors, is_quantised
from angelforge.runtime.validate.reference import KEPT, Reference

Array = NDArray[Any]

GROUP = 128  # channels of an activation, rows and columns of a weight's block
LARGEST = np.float32(448)


class Fp8Reference(Reference):
    """The whole model as an FP8 bundle computes it, from the tensors of any checkpoint.

    Weights of a checkpoint that is not FP8 are quantised as `export --precision fp8` does. Router, head, embedding and
    norms are not quantised.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        tensors: Callable[[str], Array],
        dtype: type[np.floating[Any]] = np.float64,
        keep: int = KEPT,
    ) -> None:
        """`config` and `tensors` as of `Reference`; FP8 weights are given dequantised."""
        self.shared: int = config.get("num_shared_experts") or 0
        stored = config.get("quantization_config") is not None

        def tensor(name: str) -> Array:
            return tensors(name) if stored or not is_quantised(name) else self._rounded_weight(name, tensors(name))

        super().__init__(config, tensor, dtype, keep)

    def _linear(self, x: Array, name: str) -> Array:
        # A shared MLP counts as several experts, and each quantises its own activation.
        experts = self.shared if name.endswith(".shared_experts.down_proj.weight") else 1
        rounded = [quantised_activation(part) for part in np.split(x, experts, axis=1)]
        return super()._linear(np.concatenate(rounded, axis=1), name)

    def _rounded_weight(self, name: str, weight: Array) -> Array:
        experts = self.shared if ".shared_experts." in name else 1
        axis = 1 if name.endswith(".down_proj.weight") else 0
        return np.concatenate([quantised_weight(part) for part in np.split(weight, experts, axis)], axis)


def load_fp8_reference(folder: str | Path, dtype: type[np.floating[Any]] = np.float64) -> Fp8Reference:
    """The FP8 reference of a checkpoint folder, FP8 or not."""
    return Fp8Reference(checkpoint_config(Path(folder)), checkpoint_tensors(Path(folder)), dtype)


def quantised_activation(x: Array) -> Array:
    """[T, K] as FP8 holds it, in the type of x: s = max(amax, 1e-10) / 448 by token and 128 channels."""
    result = np.empty_like(x)
    for begin in range(0, x.shape[1], GROUP):
        part = x[:, begin : begin + GROUP].astype(np.float32)
        scale = np.maximum(np.abs(part).max(axis=1, keepdims=True), np.float32(1e-10)) / LARGEST
        result[:, begin : begin + GROUP] = e4m3(part / scale).astype(x.dtype) * scale
    return result


def quantised_weight(weight: Array) -> Array:
    """[out, in] as FP8 holds it, f64: s = max(amax, 1e-4) / 448 by block of 128×128."""
    result = np.empty(weight.shape, np.float64)
    for top in range(0, weight.shape[0], GROUP):
        for left in range(0, weight.shape[1], GROUP):
            block = weight[top : top + GROUP, left : left + GROUP].astype(np.float32)
            scale = np.maximum(np.abs(block).max(), np.float32(1e-4)) / LARGEST
            result[top : top + GROUP, left : left + GROUP] = e4m3(block / scale).astype(np.float64) * scale
    return result


def e4m3(levels: Array) -> Array:
    """f32 values rounded to the nearest e4m3, ties to even, cut at ±448."""
    return np.asarray(np.clip(levels, -LARGEST, LARGEST).astype(ml_dtypes.float8_e4m3fn))
