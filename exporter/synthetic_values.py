"""Tensors of synthetic checkpoints: their names, shapes and types, and random values of useful size."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from angelforge.dtypes import DType

_BLOCK = 128
_FP8_MAX = 448.0
_BIAS_MEAN, _BIAS_SPREAD = -0.7, 0.1


class Role(Enum):
    """What a tensor does; decides its values and whether an FP8 checkpoint quantises it."""

    EMBEDDING = "embedding"
    LINEAR = "linear"
    HEAD = "head"
    NORM = "norm"
    HEAD_NORM = "head norm"
    ROUTER = "router"
    BIAS = "bias"
    SCALE = "scale"


@dataclass(frozen=True)
class Spec:
    """One tensor to write."""

    name: str
    shape: tuple[int, ...]
    role: Role
    dtype: DType

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


def tensor_specs(config: Mapping[str, Any], dtype: DType, bias_dtype: DType) -> Iterator[Spec]:
    """Every tensor of a checkpoint of `config`, in the order of the computation.

    `dtype` F8_E4M3 gives quantised linears, each followed by its `_scale_inv`, and BF16 for the rest. `bias_dtype` is
    that of the router's expert_bias.
    """
    plain = DType.BF16 if dtype is DType.F8_E4M3 else dtype
    for name, shape, role in _parameters(config):
        if role is Role.LINEAR and dtype is DType.F8_E4M3:
            yield Spec(name, shape, role, dtype)
            blocks = (-(-shape[0] // _BLOCK), -(-shape[1] // _BLOCK))
            yield Spec(name + "_scale_inv", blocks, Role.SCALE, DType.F32)
        else:
            yield Spec(name, shape, role, bias_dtype if role is Role.BIAS else plain)


_Parameter = tuple[str, tuple[int, ...], Role]


def _parameters(config: Mapping[str, Any]) -> Iterator[_Parameter]:
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    yield "model.word_embeddings.weight", (vocab, hidden), Role.EMBEDDING
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (hidden,), Role.NORM
        yield from _attention(config, prefix + "attention.")
        yield prefix + "post_attention_layernorm.weight", (hidden,), Role.NORM
        if layer < config["first_k_dense_replace"]:
            yield from _gated(prefix + "mlp.", hidden, config["intermediate_size"])
        else:
            yield from _mixture(config, prefix + "mlp.")
    yield "model.norm.weight", (hidden,), Role.NORM
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (vocab, hidden), Role.HEAD


def _attention(config: Mapping[str, Any], prefix: str) -> Iterator[_Parameter]:
    hidden, heads, size = config["hidden_size"], config["num_attention_heads"], config["head_dim"]
    rows = (heads + 2 * config["num_key_value_heads"]) * size
    yield prefix + "query_key_value.weight", (rows, hidden), Role.LINEAR
    if config["use_qk_norm"]:
        yield prefix + "query_layernorm.weight", (size,), Role.HEAD_NORM
        yield prefix + "key_layernorm.weight", (size,), Role.HEAD_NORM
    yield prefix + "dense.weight", (hidden, heads * size), Role.LINEAR


def _mixture(config: Mapping[str, Any], prefix: str) -> Iterator[_Parameter]:
    hidden, experts, width = config["hidden_size"], config["num_experts"], config["moe_intermediate_size"]
    yield prefix + "gate.weight", (experts, hidden), Role.ROUTER
    yield prefix + "gate.expert_bias", (experts,), Role.BIAS
    for expert in range(experts):
        yield from _gated(f"{prefix}experts.{expert}.", hidden, width)
    if config["num_shared_experts"]:
        yield from _gated(prefix + "shared_experts.", hidden, width * config["num_shared_experts"])


def _gated(prefix: str, hidden: int, width: int) -> Iterator[_Parameter]:
    yield prefix + "gate_proj.weight", (width, hidden), Role.LINEAR
    yield prefix + "up_proj.weight", (width, hidden), Role.LINEAR
    yield prefix + "down_proj.weight", (hidden, width), Role.LINEAR


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
