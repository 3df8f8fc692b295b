"""Tensors of synthetic checkpoints: their names, shapes and types, and random values of useful size."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from angelforge.config import ModelConfig
from angelforge.dtypes import DType
from angelforge.inventory import expected_tensors

_BLOCK = 128
_FP8_MAX = 448.0
_BIAS_MEAN, _BIAS_SPREAD = -0.7, 0.1


class Role(Enum):
    """What a tensor does, which decides its values; the value is how such names end, first match taken."""

    SCALE = ("_scale_inv",)
    BIAS = (".expert_bias",)
    ROUTER = (".gate.weight",)
    HEAD_NORM = (".query_layernorm.weight", ".key_layernorm.weight")
    NORM = ("_layernorm.weight", "model.norm.weight")
    EMBEDDING = (".word_embeddings.weight",)
    HEAD = ("lm_head.weight",)
    LINEAR = (".weight",)


@dataclass(frozen=True)
class Spec:
    """One tensor to write."""

    name: str
    shape: tuple[int, ...]
    dtype: DType

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def role(self) -> Role:
        """What it does."""
        return next(role for role in Role if self.name.endswith(role.value))


def tensor_specs(config: ModelConfig, dtype: DType, bias_dtype: DType) -> list[Spec]:
    """Every tensor of a checkpoint of `config`; in an FP8 checkpoint each quantised weight stands before its scale.

    `dtype` is that of all tensors whose type the architecture leaves open, `bias_dtype` that of the router's bias.
    """
    specs = []
    for name, expected in expected_tensors(config).items():
        wanted = bias_dtype if name.endswith(Role.BIAS.value) else dtype
        specs.append(Spec(name, expected.shape, wanted if wanted in expected.dtypes else next(iter(expected.dtypes))))
    return specs


def checkpoint_values(specs: Iterable[Spec], seed: int) -> Iterator[NDArray[Any]]:
    """The values of each of `specs`, one at a time, in its own type and C order."""
    scale: NDArray[np.float32] | None = None
    for spec in specs:
        if spec.role is Role.SCALE and scale is not None:
            yield scale
            continue
        values = random_values(spec, seed)
        if spec.dtype is DType.F8_E4M3:
            quantised, scale = quantise_blocks(values)
            yield quantised
        else:
            yield values.astype(spec.dtype.numpy)


def random_values(spec: Spec, seed: int) -> NDArray[np.float32]:
    """f32 values for one tensor; they depend on `seed`, name and shape alone, not on type or order of writing.

    Matrices keep the size of what passes through them. Router logits are N(0, 1.5²) and the bias is about -0.7, so that
    routing is spread over all experts and biased scores have both signs, as in a trained model. Norm weights are not 1.
    """
    generator = np.random.default_rng([seed, zlib.crc32(spec.name.encode())])
    if spec.role in (Role.NORM, Role.HEAD_NORM):
        middle = 1.0 if spec.role is Role.NORM else 1.4  # above 1: attention that is not almost uniform
        return generator.uniform(0.5 * middle, 1.5 * middle, spec.shape).astype(np.float32)
    values = generator.standard_normal(spec.shape, np.float32)
    if spec.role is Role.BIAS:
        return values * np.float32(_BIAS_SPREAD) + np.float32(_BIAS_MEAN)
    gain = {Role.ROUTER: 1.5, Role.HEAD: 2.0}.get(spec.role, 1.0)
    if spec.role is not Role.EMBEDDING:
        gain /= math.sqrt(spec.shape[-1])
    values *= np.float32(gain)
    return values


def quantise_blocks(weight: NDArray[np.float32]) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """(e4m3 [out, in], f32 scale [⌈out/128⌉, ⌈in/128⌉]) of a weight [out, in].

    As in published FP8 checkpoints: scale = max(largest of the 128×128 block, 1e-4) / 448, weight ≈ e4m3 × scale.
    """
    rows, columns = weight.shape
    up, across = -(-rows // _BLOCK), -(-columns // _BLOCK)
    padded = np.zeros((up * _BLOCK, across * _BLOCK), np.float32)
    padded[:rows, :columns] = weight
    blocks = padded.reshape(up, _BLOCK, across, _BLOCK)
    scale = np.maximum(np.abs(blocks).max(axis=(1, 3)), np.float32(1e-4)) / np.float32(_FP8_MAX)
    blocks /= scale[:, None, :, None]
    np.clip(padded, -_FP8_MAX, _FP8_MAX, out=padded)
    return padded[:rows, :columns].astype(DType.F8_E4M3.numpy), scale
