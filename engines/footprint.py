"""What a model occupies, computed from its configuration: weights by kind, KV cache, activations. All in bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from functools import partial

from angelforge.config import ModelConfig
from angelforge.draft_config import DraftConfig
from angelforge.dtypes import DType
from angelforge.plugins.paged_attention.operator import SPLIT_LENGTH, SPLIT_QUERIES
from angelforge.precision import Precision
from angelforge.ranks import rank_config

_SCALE_BLOCK = 128
_F32 = DType.F32.itemsize


class Kind(Enum):
    """Kinds of weights; the value names it in tables."""

    EMBEDDING = "embedding"
    HEAD = "head"
    ATTENTION = "attention"
    DENSE = "dense MLP"
    ROUTER = "router"
    ROUTED = "routed experts"
    SHARED = "shared experts"
    NORM = "norms"
    ROPE = "rope tables"
    DRAFT = "draft"
    DRAFT_TABLES = "draft's tables"

    @property
    def split(self) -> bool:
        """Whether ranks share it: heads, intermediate widths and vocabulary are sliced, the rest is on every rank."""
        return self not in (Kind.ROUTER, Kind.NORM, Kind.ROPE) and not self.drafted

    @property
    def drafted(self) -> bool:
        """Whether it belongs to the draft, which is whole on the first rank."""
        return self in (Kind.DRAFT, Kind.DRAFT_TABLES)

    @property
    def looked_up(self) -> bool:
        """Whether a step reads a few rows of it and not the whole."""
        return self in (Kind.EMBEDDING, Kind.ROPE, Kind.DRAFT_TABLES)


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of one kind of weights: of the whole model, and on each rank."""

    kind: Kind
    total: int
    per_rank: int


def weight_bytes(
    config: ModelConfig, precision: Precision, max_context: int, ranks: int = 1
) -> tuple[WeightBytes, ...]:
    """Bytes of every kind of weights as a bundle of that precision and context holds them.

    Raises:
        UsageError: the model cannot be split over so many ranks.
    """
    whole = _totals(config, precision, max_context)
    part = _totals(rank_config(config, precision, ranks), precision, max_context)
    return tuple(WeightBytes(kind, total, part[kind]) for kind, total in whole.items())


def draft_bytes(draft: DraftConfig, precision: Precision, max_context: int) -> tuple[WeightBytes, ...]:
    """Bytes of a draft, all on the first rank: a layer, `fc` and a head; tables of rotations and of its tokens."""
    d, hidden = draft, draft.hidden_size
    halves = 2 if precision.quantized else 1  # of the attention's input, which FP8 reads one by one
    layer = halves * _matmul(d.qkv_size, 2 * hidden // halves, precision)
    layer += _matmul(hidden, d.num_attention_heads * d.head_dim, precision)
    layer += 2 * _matmul(d.intermediate_size, hidden, precision) + _matmul(hidden, d.intermediate_size, precision)
    norms = 4 + (len(d.capture_layers) if d.fc_norm else 0)
    plain = hidden * (d.captured_size + d.draft_vocab_size + norms) * precision.activation.itemsize
    tables = max_context * d.rotary_dim * _F32 + d.draft_vocab_size * DType.I64.itemsize
    found = ((Kind.DRAFT, layer + plain), (Kind.DRAFT_TABLES, tables))
    return tuple(WeightBytes(kind, nbytes, nbytes) for kind, nbytes in found)


def draft_kv_bytes_per_token(draft: DraftConfig, dtype: DType) -> int:
    """Bytes of keys and values of one token in a draft's only layer."""
    return 2 * draft.num_key_value_heads * draft.head_dim * dtype.itemsize


def _matmul(rows: int, columns: int, precision: Precision) -> int:
    """A weight of a linear or expert, with its f32 block scales if quantised."""
    scales = math.ceil(rows / _SCALE_BLOCK) * math.ceil(columns / _SCALE_BLOCK) * _F32
    return rows * columns * precision.matmul.itemsize + (scales if precision.quantized else 0)


def _totals(c: ModelConfig, precision: Precision, max_context: int) -> dict[Kind, int]:
    act = precision.activation.itemsize
    matmul = partial(_matmul, precision=precision)

    def mlp(width: int) -> int:
        return 2 * matmul(width, c.hidden_size) + matmul(c.hidden_size, width)

    attention = matmul(c.qkv_size, c.hidden_size) + matmul(c.hidden_size, c.num_attention_heads * c.head_dim)
    norms_of_layer = 2 * c.hidden_size + (2 * c.head_dim if c.use_qk_norm else 0)
    table = c.vocab_size * c.hidden_size * act
    return {
        Kind.EMBEDDING: 0 if c.tie_word_embeddings else table,  # tied: one table, counted as the head
        Kind.HEAD: table,
        Kind.ATTENTION: c.num_hidden_layers * attention,
        Kind.DENSE: c.first_k_dense_replace * mlp(c.intermediate_size),
        Kind.ROUTER: c.num_moe_layers * c.num_experts * (c.hidden_size + 1) * _F32,
        Kind.ROUTED: c.num_moe_layers * c.num_experts * mlp(c.moe_intermediate_size),
        Kind.SHARED: c.num_moe_layers * c.num_shared_experts * mlp(c.moe_intermediate_size),
        Kind.NORM: (c.num_hidden_layers * norms_of_layer + c.hidden_size) * act,
        Kind.ROPE: max_context * c.rotary_dim * _F32,  # cos and sin of rotary_dim/2 pairs
    }


def kv_bytes_per_token(config: ModelConfig, dtype: DType) -> int:
    """Bytes of keys and values of one token in all layers; 65,536 for AntAngelMed in bf16."""
    return config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * dtype.itemsize


def activation_bytes(config: ModelConfig, dtype: DType, max_tokens: int, max_batch: int, ranks: int = 1) -> int:
    """Upper estimate of the buffers alive at once in a step of `max_tokens` tokens with logits of `max_batch` rows.

    Per token: residual, normed and block output (f32 where summed), fused QKV and attention output, and for each
    expert of the token its gated width and its output row. Logits are f32; of several ranks each has its own and those
    of all, before and after the sum. `config` is that of one rank's part.
    """
    c = config
    residual = c.hidden_size * (2 * _F32 + 2 * dtype.itemsize)
    attention = (c.qkv_size + c.num_attention_heads * c.head_dim) * dtype.itemsize
    experts = c.experts_per_token * (c.moe_intermediate_size * _F32 + c.hidden_size * dtype.itemsize)
    dense = 2 * c.intermediate_size * dtype.itemsize
    logits = max_batch * c.vocab_size * _F32 * (1 if ranks == 1 else 1 + 2 * ranks)
    return max_tokens * (residual + attention + max(experts, dense)) + logits + partial_bytes(c, 0, max_batch)


def partial_bytes(config: ModelConfig, cache_tokens: int, batch: int) -> int:
    """Bytes of the partial results of PagedAttention, f32 [C, heads, head_dim] and [C, heads], for one layer.

    C grows with the tokens that the pool holds and with the batch (`plugins/paged_attention/operator.py`).
    """
    row = config.num_attention_heads * (config.head_dim + 1) * _F32
    return -(-cache_tokens * SPLIT_QUERIES * row // SPLIT_LENGTH) + batch * SPLIT_QUERIES * row
