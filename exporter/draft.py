"""An EAGLE3 draft as modules that read like its checkpoint (MODEL.md, EAGLE3 draft): one Llama layer."""

import onnx_ir as ir
from onnxscript import OpBuilder, nn

from angelforge.config import ModelConfig
from angelforge.draft_config import DraftConfig
from angelforge.dtypes import DType
from angelforge.exporter.attention import Rope, attend
from angelforge.exporter.mlp import DenseMLP
from angelforge.exporter.model import Embedding
from angelforge.exporter.parts import Normed, Projection, ResidualNorm, projection
from angelforge.exporter.step import Step
from angelforge.plugins.all_reduce.operator import ALL_REDUCE
from angelforge.plugins.operator import call
from angelforge.plugins.qkv_rotate.operator import QKV_ROTATE
from angelforge.precision import Precision


class JoinedProjection(Projection):
    """W · [token; state]: one projection of both side by side."""

    def forward(self, op: OpBuilder, token: Normed, state: Normed) -> ir.Value:  # type: ignore[override]
        """token, state [T, H] → [T, out]."""
        return super().forward(op, op.Concat(token.plain, state.plain, axis=1))


class SplitProjection(nn.Module):  # type: ignore[misc]
    """The same in FP8, whose tensors ONNX does not join: a product for each, and their sum."""

    def __init__(self, config: DraftConfig, precision: Precision) -> None:
        super().__init__()
        self.token = projection(config.hidden_size, config.qkv_size, precision)
        self.state = projection(config.hidden_size, config.qkv_size, precision)

    def forward(self, op: OpBuilder, token: Normed, state: Normed) -> ir.Value:
        """token, state [T, H] → [T, out]."""
        return op.Add(self.token(op, token.for_matmul), self.state(op, state.for_matmul))


class DraftAttention(nn.Module):  # type: ignore[misc]
    """`midlayer.self_attn`: twice as wide at its input, RoPE over whole heads, no QK-norm."""

    def __init__(self, config: DraftConfig, precision: Precision) -> None:
        super().__init__()
        self.config = config
        self.quantized = precision.quantized
        # q, k and v stacked
        if precision.quantized:
            self.qkv_proj = SplitProjection(config, precision)
        else:
            self.qkv_proj = JoinedProjection(
                2 * config.hidden_size, config.qkv_size, precision.matmul, precision.activation
            )
        self.o_proj = projection(config.num_attention_heads * config.head_dim, config.hidden_size, precision)

    def forward(
        self,
        op: OpBuilder,
        token: Normed,
        state: Normed,
        step: Step,
        rope: tuple[ir.Value, ir.Value],
        pool: ir.Value,
    ) -> tuple[ir.Value, ir.Value]:
        """token, state [T, H] → (what attention adds to the residual [T, H], the pool with K and V written)."""
        config = self.config
        query, pool = call(
            op,
            QKV_ROTATE,
            self.qkv_proj(op, token, state),
            *rope,
            step.positions,
            step.slots,
            step.num_tokens,
            pool,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            rotary_dim=config.rotary_dim,
        )
        attended = attend(op, query, pool, step, config.head_dim, self.quantized)
        return call(op, ALL_REDUCE, self.o_proj(op, attended)), pool


class DraftLayer(nn.Module):  # type: ignore[misc]
    """`midlayer`: the next token's embedding beside the present token's state."""

    def __init__(self, config: DraftConfig, precision: Precision) -> None:
        super().__init__()
        self.input_layernorm = ResidualNorm(config, precision, precision.quantized)
        self.hidden_norm = ResidualNorm(config, precision, precision.quantized)
        self.self_attn = DraftAttention(config, precision)
        self.post_attention_layernorm = ResidualNorm(config, precision, precision.quantized)
        self.mlp = DenseMLP(config, precision)

    def forward(
        self,
        op: OpBuilder,
        embedding: ir.Value,
        hidden: ir.Value,
        step: Step,
        rope: tuple[ir.Value, ir.Value],
        pool: ir.Value,
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """embedding, hidden [T, H] → (residual [T, H], what the MLP adds to it [T, H], pool)."""
        _, token = self.input_layernorm(op, embedding, None)
        _, state = self.hidden_norm(op, hidden, None)
        delta, pool = self.self_attn(op, token, state, step, rope, pool)
        residual, normed = self.post_attention_layernorm(op, hidden, delta)
        return residual, self.mlp(op, normed, step.num_tokens), pool


class DraftBody(nn.Module):  # type: ignore[misc]
    """All of the draft's own weights but `fc`, which runs in the target's graph; rope tables of its own."""

    def __init__(self, config: DraftConfig, precision: Precision, max_context: int) -> None:
        super().__init__("draft")
        self.norm_output = config.norm_output
        self.rope = Rope(max_context, config.rotary_dim)
        self.midlayer = DraftLayer(config, precision)
        self.norm = ResidualNorm(config, precision, quantize=False)  # the head is not quantised, as the target's is not
        self.lm_head = Projection(config.hidden_size, config.draft_vocab_size, precision.activation, DType.F32)
        self.d2t = nn.Parameter([config.draft_vocab_size], dtype=ir.DataType.INT64)

    def forward(
        self, op: OpBuilder, embedding: ir.Value, hidden: ir.Value, step: Step, pool: ir.Value
    ) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value]:
        """embedding, hidden [T, H] → (logits f32 [R, V], likeliest target ids int64 [R], hidden_out [R, H], pool)."""
        residual, delta, pool = self.midlayer(op, embedding, hidden, step, self.rope(op), pool)
        wanted = [op.Gather(value, step.logit_indices, axis=0) for value in (residual, delta)]
        stream, normed = self.norm(op, *wanted)
        logits = self.lm_head(op, normed.plain)
        best = op.ArgMax(logits, axis=1, keepdims=0)  # the first of equals
        ids = op.Add(best, op.Gather(self.d2t, best, axis=0))
        return logits, ids, normed.plain if self.norm_output else stream, pool


class SharedEmbedding(nn.Module):  # type: ignore[misc]
    """`model.word_embeddings` of the target: the same weight at the same place."""

    def __init__(self, config: ModelConfig, dtype: DType) -> None:
        super().__init__("model")
        self.word_embeddings = Embedding(config, dtype)

    def forward(self, op: OpBuilder, input_ids: ir.Value) -> ir.Value:
        """int64 [T] → [T, H]."""
        return self.word_embeddings(op, input_ids)


class DraftLM(nn.Module):  # type: ignore[misc]
    """One step of the draft."""

    def __init__(self, config: DraftConfig, target: ModelConfig, precision: Precision, max_context: int) -> None:
        super().__init__("")
        self.model = SharedEmbedding(target, precision.activation)
        self.draft = DraftBody(config, precision, max_context)

    def forward(
        self, op: OpBuilder, step: Step, hidden: ir.Value, pool: ir.Value
    ) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value]:
        """hidden [T, H] → (logits f32 [R, draft vocabulary], target ids int64 [R], hidden_out [R, H], pool)."""
        return self.draft(op, self.model(op, step.input_ids), hidden, step, pool)
