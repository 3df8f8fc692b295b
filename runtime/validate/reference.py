"""An independent reference of BailingMoeV2 in plain NumPy: one sequence, full causal attention, no cache.

It shares no code with the product: it reads config.json and the safetensors files by itself, so that a
misunderstanding in the product cannot hide here. It is written to be read, one function a formula.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from angelforge.runtime.validate.plain_checkpoint import checkpoint_config, checkpoint_tensors

Array = NDArray[Any]

KEPT = 2**30  # bytes of weights that are kept for the next sequence


@dataclass(frozen=True)
class Trace:
    """What one pass computed. T tokens, L layers, k experts per token; `None` for dense layers."""

    logits: Array  # [T, vocab]
    hidden: Array  # [T, hidden], after the final norm
    residuals: tuple[Array, ...]  # L + 1 times [T, hidden]: the embedding, then the stream after each layer
    experts: tuple[Array | None, ...]  # L times int64 [T, k], best biased score first
    weights: tuple[Array | None, ...]  # L times [T, k], in the order of `experts`
    margins: tuple[Array | None, ...]  # L times [T]: by how much the closest decision of the router was taken
    keys: tuple[Array, ...]  # L times [T, kv_heads, head_dim], after norm and RoPE: what a cache holds
    values: tuple[Array, ...]  # L times [T, kv_heads, head_dim]


@dataclass(frozen=True)
class Routing:
    """The router's decision for T tokens."""

    experts: Array  # int64 [T, k], best biased score first
    weights: Array  # [T, k], in the order of `experts`
    margins: Array  # [T], smallest gap between a kept and a dropped group or expert: 0 is a tie


class Reference:
    """The whole model, computed in `dtype` (f64 unless told otherwise) from the tensors of a checkpoint.

    `config` is the dictionary of a config.json, or a dataclass with fields of the same names. `tensors` gives a
    checkpoint's tensor by its name, in any float type. Memory is a weight matrix and `keep` bytes of others.
    """

    def __init__(
        self,
        config: Any,
        tensors: Callable[[str], Array],
        dtype: type[np.floating[Any]] = np.float64,
        keep: int = KEPT,
    ):
        raw: dict[str, Any] = dict(config) if isinstance(config, Mapping) else dataclasses.asdict(config)
        self.config = raw
        self.dtype = np.dtype(dtype)
        self._tensors = tensors
        self._cache: dict[str, Array] = {}
        self._keep = keep
        self.heads: int = raw["num_attention_heads"]
        self.kv_heads: int = raw["num_key_value_heads"]
        self.head_dim: int = raw.get("head_dim") or raw["hidden_size"] // self.heads
        self.layers: int = raw["num_hidden_layers"]

    def tensor(self, name: str) -> Array:
        """One tensor of the checkpoint in the type of the computation."""
        if name in self._cache:
            return self._cache[name]
        array = np.asarray(self._tensors(name)).astype(self.dtype)
        if array.nbytes <= self._keep:
            self._keep -= array.nbytes
            self._cache[name] = array
        return array

    def logits(self, ids: Sequence[int] | Array, positions: Sequence[int] | Array | None = None) -> Array:
        """[T, vocab] logits of every token of one sequence; positions count from 0 unless given."""
        return self.trace(ids, positions).logits

    def trace(self, ids: Sequence[int] | Array, positions: Sequence[int] | Array | None = None) -> Trace:
        """Everything that happens on the way to the logits."""
        ids = np.asarray(ids, np.int64)
        positions = np.arange(len(ids)) if positions is None else np.asarray(positions, np.int64)
        x = self.embed(ids)  # [T, H]
        residuals, routings, keys, values = [x], [], [], []
        for layer in range(self.layers):
            x, key, value = self.attention_block(x, layer, positions)
            x, routing = self.mlp_block(x, layer)
            residuals.append(x)
            routings.append(routing)
            keys.append(key)
            values.append(value)
        return Trace(
            logits=self.head(x),
            hidden=self._norm(x, "model.norm.weight"),
            residuals=tuple(residuals),
            experts=tuple(None if r is None else r.experts for r in routings),
            weights=tuple(None if r is None else r.weights for r in routings),
            margins=tuple(None if r is None else r.margins for r in routings),
            keys=tuple(keys),
            values=tuple(values),
        )

    def embed(self, ids: Array) -> Array:
        """[T, H]: the embedding's rows for ids int64 [T]; the rest is not widened."""
        return np.asarray(self._tensors("model.word_embeddings.weight"))[ids].astype(self.dtype)

    def attention_block(
        self, x: Array, layer: int, positions: Array, sequences: Array | None = None
    ) -> tuple[Array, Array, Array]:
        """The first half of a layer: (residual stream [T, H] with attention added, keys, values) of x [T, H].

        `sequences` [T] tells whose each token is, where x holds several.
        """
        prefix = f"model.layers.{layer}."
        cos, sin = (table.astype(self.dtype) for table in rope_tables(self.config, positions))
        normed = self._norm(x, prefix + "input_layernorm.weight")
        attended, key, value = self._attention(normed, prefix + "attention.", cos, sin, positions, sequences)
        return x + attended, key, value

    def mlp_block(self, x: Array, layer: int) -> tuple[Array, Routing | None]:
        """The second half of a layer: (residual stream [T, H] with the MLP added, the router's choice) of x [T, H]."""
        fed, routing = self._feed_forward(self._norm(x, f"model.layers.{layer}.post_attention_layernorm.weight"), layer)
        return x + fed, routing

    def head(self, x: Array) -> Array:
        """[T, vocab] logits of the residual stream x [T, H] behind the last layer."""
        name = "model.word_embeddings.weight" if self.config.get("tie_word_embeddings") else "lm_head.weight"
        return np.asarray(self._norm(x, "model.norm.weight") @ self.tensor(name).T)

    def _norm(self, x: Array, name: str) -> Array:
        return rms_norm(x, self.tensor(name), self.config["rms_norm_eps"])

    def _linear(self, x: Array, name: str) -> Array:
        """x [T, in] · weight [out, in]ᵀ of one of the weights that FP8 checkpoints quantise."""
        return np.asarray(x @ self.tensor(name).T)

    def _attention(
        self, x: Array, prefix: str, cos: Array, sin: Array, positions: Array, sequences: Array | None
    ) -> tuple[Array, Array, Array]:
        tokens = len(x)
        fused = self._linear(x, prefix + "query_key_value.weight")  # [T, (heads + 2 kv_heads) · head_dim]
        fused = fused.reshape(tokens, self.heads + 2 * self.kv_heads, self.head_dim)
        query, key, value = np.split(fused, [self.heads, self.heads + self.kv_heads], axis=1)
        if self.config.get("use_qk_norm", True):
            query = self._norm(query, prefix + "query_layernorm.weight")
            key = self._norm(key, prefix + "key_layernorm.weight")
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        out = causal_attention(query, key, value, positions, sequences)  # [T, heads, head_dim]
        return self._linear(out.reshape(tokens, -1), prefix + "dense.weight"), key, value

    def _feed_forward(self, x: Array, layer: int) -> tuple[Array, Routing | None]:
        prefix = f"model.layers.{layer}.mlp."
        if layer < self.config.get("first_k_dense_replace", 0):
            return self._gated(x, prefix), None
        routing = route(
            x @ self.tensor(prefix + "gate.weight").T,
            self.tensor(prefix + "gate.expert_bias"),
            groups=self.config.get("n_group") or 1,
            kept_groups=self.config.get("topk_group") or 1,
            top_k=self.config["num_experts_per_tok"],
            scaling=self.config["routed_scaling_factor"],
        )
        out = np.zeros_like(x)
        for expert in np.unique(routing.experts):
            rows, slots = np.nonzero(routing.experts == expert)
            weight = routing.weights[rows, slots][:, None]
            out[rows] += weight * self._gated(x[rows], f"{prefix}experts.{expert}.")
        if self.config.get("num_shared_experts"):
            out = out + self._gated(x, prefix + "shared_experts.")
        return out, routing

    def _gated(self, x: Array, prefix: str) -> Array:
        gate, up = (self._linear(x, f"{prefix}{name}_proj.weight") for name in ("gate", "up"))
        return self._linear(gate * sigmoid(gate) * up, prefix + "down_proj.weight")


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x / sqrt(mean(x²) + eps) · weight over the last axis."""
    return np.asarray(x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + x.dtype.type(eps)) * weight)


def sigmoid(x: Array) -> Array:
    """1 / (1 + e^-x) without overflow for large negative x."""
    small = np.exp(-np.abs(x))
    return np.asarray(np.where(x >= 0, 1, small) / (1 + small))


def route(logits: Array, bias: Array, *, groups: int, kept_groups: int, top_k: int, scaling: float) -> Routing:
    """Group-limited sigmoid routing of [T, E] router logits (MODEL.md, Mathematics: Router)."""
    tokens, experts = logits.shape
    scores = sigmoid(logits)
    biased = scores + bias
    best_two = -np.sort(-biased.reshape(tokens, groups, -1), axis=-1)[..., :2]
    group_scores = best_two.sum(axis=-1)  # [T, groups]
    group_order = np.argsort(-group_scores, axis=-1, kind="stable")
    kept = np.zeros((tokens, groups), bool)
    np.put_along_axis(kept, group_order[:, :kept_groups], True, axis=-1)
    masked = np.where(np.repeat(kept, experts // groups, axis=-1), biased, -np.inf)
    order = np.argsort(-masked, axis=-1, kind="stable")
    chosen = order[:, :top_k]
    weights = np.take_along_axis(scores, chosen, axis=-1)
    if top_k > 1:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
    gaps = [_gap(group_scores, group_order, kept_groups), _gap(masked, order, top_k)]
    return Routing(chosen, weights * logits.dtype.type(scaling), np.minimum(*gaps))


def _gap(scores: Array, order: Array, taken: int) -> Array:
    """[T] distance between the last score taken and the first one left."""
    if taken >= scores.shape[-1]:
        return np.full(len(scores), np.inf)
    ordered = np.take_along_axis(scores, order[:, taken - 1 : taken + 1], axis=-1)
    return np.asarray(ordered[:, 0] - ordered[:, 1])


def rotary_dim(config: Mapping[str, Any]) -> int:
    """How many of a head's first dimensions are rotated."""
    if config.get("rotary_dim"):
        return int(config["rotary_dim"])
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return int(head_dim * _rope_entry(config, "partial_rotary_factor"))


def _rope_entry(config: Mapping[str, Any], key: str) -> float:
    return float(config[key] if config.get(key) is not None else config["rope_parameters"][key])


def _yarn(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    block = config.get("rope_scaling") or config.get("rope_parameters") or {}
    return block if "factor" in block else None


def inverse_frequencies(config: Mapping[str, Any]) -> Array:
    """[rotary_dim / 2] f64 angles per position; blended as in YaRN (arXiv 2309.00071, section 3.2) where asked for.

    Dimension i turns original/(2π)·base^(-2i/dim) times within the trained length. Those that turn beta_fast times
    or more stay, those that turn beta_slow times or less are slowed by `factor`; in between the blend is linear in i.
    """
    dim, base = rotary_dim(config), _rope_entry(config, "rope_theta")
    plain = np.array([base ** (-2 * i / dim) for i in range(dim // 2)])
    yarn = _yarn(config)
    if yarn is None:
        return plain

    def index_of(turns: float) -> float:
        """The (fractional) index i whose dimension turns so many times within the trained length."""
        return dim * math.log(original / (2 * math.pi * turns)) / (2 * math.log(base))

    original = yarn.get("original_max_position_embeddings") or config["max_position_embeddings"]
    first = max(math.floor(index_of(yarn.get("beta_fast") or 32)), 0)
    last = min(math.ceil(index_of(yarn.get("beta_slow") or 1)), dim - 1)
    share = np.clip((np.arange(dim // 2) - first) / max(last - first, 0.001), 0, 1)  # of the slowed frequency
    return np.asarray((1 - share) * plain + share * plain / yarn["factor"])


def attention_factor(config: Mapping[str, Any]) -> float:
    """What cos and sin are multiplied with: 0.1·ln(factor) + 1 under YaRN unless the config gives it, 1 otherwise."""
    yarn = _yarn(config)
    if yarn is None:
        return 1.0
    return float(yarn.get("attention_factor") or 0.1 * math.log(yarn["factor"]) + 1)


def rope_tables(config: Mapping[str, Any], positions: Array) -> tuple[Array, Array]:
    """(cos, sin), each f64 [T, rotary_dim / 2]."""
    angles = np.asarray(positions, np.float64)[:, None] * inverse_frequencies(config)
    return np.cos(angles) * attention_factor(config), np.sin(angles) * attention_factor(config)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """RoPE on the first dimensions of [T, heads, head_dim]: pairs (i, i + rotary_dim / 2); the rest passes through."""
    half = cos.shape[-1]
    first, second, rest = np.split(x, [half, 2 * half], axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def causal_attention(query: Array, key: Array, value: Array, positions: Array, sequences: Array | None = None) -> Array:
    """[T, heads, head_dim]; head h reads KV head h // (heads / kv_heads) up to its own position; scale 1/√head_dim."""
    _, heads, head_dim = query.shape
    sharing = heads // key.shape[1]
    visible = positions[None, :] <= positions[:, None]  # [T, T]
    if sequences is not None:
        visible &= sequences[None, :] == sequences[:, None]
    out = np.empty_like(query)
    for head in range(heads):  # one head at a time: [T, T] is the largest thing held
        scores = query[:, head] @ key[:, head // sharing].T / query.dtype.type(math.sqrt(head_dim))
        scores = np.where(visible, scores, -np.inf)
        shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
        shares /= shares.sum(axis=-1, keepdims=True)
        out[:, head] = shares @ value[:, head // sharing]
    return out


def load_reference(folder: str | Path, dtype: type[np.floating[Any]] = np.float64) -> Reference:
    """The reference of a checkpoint folder. FP8 weights are dequantised; activations are not quantised."""
    return Reference(checkpoint_config(Path(folder)), checkpoint_tensors(Path(folder)), dtype)
