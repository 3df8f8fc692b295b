"""Grouped-query attention with QK-norm, partial RoPE and a paged KV pool."""

import onnx_ir as ir
from onnxscript import OpBuilder, nn

from angelforge.config import ModelConfig
from angelforge.exporter.parts import Activation, Weights, projection
from angelforge.exporter.step import Step
from angelforge.plugins.all_reduce.operator import ALL_REDUCE
from angelforge.plugins.attention_merge.operator import ATTENTION_MERGE
from angelforge.plugins.attention_merge_quantize.operator import ATTENTION_MERGE_QUANTIZE
from angelforge.plugins.operator import call
from angelforge.plugins.paged_attention.operator import PAGED_ATTENTION, SPLIT_LENGTH, SPLIT_QUERIES
from angelforge.plugins.qkv_prepare.operator import QKV_PREPARE
from angelforge.precision import Precision


class Rope(nn.Module):  # type: ignore[misc]
    """The cos and sin tables [max_context, rotary_dim/2], f32; with YaRN the attention factor is multiplied in."""

    def __init__(self, positions: int, rotary_dim: int) -> None:
        super().__init__("rope")
        self.cos = nn.Parameter([positions, rotary_dim // 2], dtype=ir.DataType.FLOAT)
        self.sin = nn.Parameter([positions, rotary_dim // 2], dtype=ir.DataType.FLOAT)

    def forward(self, op: OpBuilder) -> tuple[ir.Value, ir.Value]:
        """(cos, sin)."""
        return self.cos, self.sin


class Attention(nn.Module):  # type: ignore[misc]
    """`model.layers.N.attention` of the checkpoint."""

    def __init__(self, config: ModelConfig, precision: Precision) -> None:
        super().__init__()
        self.config = config
        self.precision = precision
        activation = precision.activation
        query_size = config.num_attention_heads * config.head_dim
        self.query_key_value = projection(config.hidden_size, config.qkv_size, precision)
        self.query_layernorm = Weights(activation, config.head_dim)
        self.key_layernorm = Weights(activation, config.head_dim)
        self.dense = projection(query_size, config.hidden_size, precision)

    def forward(
        self, op: OpBuilder, normed: Activation, step: Step, rope: tuple[ir.Value, ir.Value], pool: ir.Value
    ) -> tuple[ir.Value, ir.Value]:
        """normed [T, H] → (what attention adds to the residual [T, H], the pool with K and V written)."""
        config = self.config
        query, pool = call(
            op,
            QKV_PREPARE,
            self.query_key_value(op, normed),
            *self.query_layernorm(op),
            *self.key_layernorm(op),
            *rope,
            step.positions,
            step.slots,
            step.num_tokens,
            pool,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            rotary_dim=config.rotary_dim,
            epsilon=config.rms_norm_eps,
        )
        attended = attend(op, query, pool, step, config.head_dim, self.precision.quantized)
        return call(op, ALL_REDUCE, self.dense(op, attended)), pool


def attend(
    op: OpBuilder, query: ir.Value, pool: ir.Value, step: Step, head_dim: int, quantized: bool = False
) -> Activation:
    """query [T, heads, D] over the written pool → [T, heads·D]."""
    parts = call(
        op,
        PAGED_ATTENTION,
        query,
        pool,
        step.page_table,
        step.query_start,
        step.kv_length,
        step.positions,
        scale=head_dim**-0.5,
        split_length=SPLIT_LENGTH,
        split_queries=SPLIT_QUERIES,
    )
    merge = ATTENTION_MERGE_QUANTIZE if quantized else ATTENTION_MERGE
    merged: Activation = call(op, merge, *parts, step.query_start, step.kv_length, split_length=SPLIT_LENGTH)
    return merged
