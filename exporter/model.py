"""BailingMoeV2 as modules that read like its checkpoint (MODEL.md, mathematics)."""

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir
from onnxscript import OpBuilder, nn

from angelforge.config import ModelConfig
from angelforge.draft_config import DraftConfig
from angelforge.dtypes import DType
from angelforge.exporter.attention import Attention, Rope
from angelforge.exporter.captured import CapturedStates
from angelforge.exporter.mlp import DenseMLP, SparseMLP
from angelforge.exporter.parts import Projection, ResidualNorm, weight
from angelforge.exporter.ranks import ids_of_rank, logits_of_all
from angelforge.exporter.step import Step
from angelforge.plugins.all_reduce.operator import ALL_REDUCE
from angelforge.plugins.embedding.operator import EMBEDDING
from angelforge.plugins.operator import call
from angelforge.precision import Precision


class Embedding(nn.Module):  # type: ignore[misc]
    """`model.word_embeddings`; with several ranks each holds and adds the rows of its part of the vocabulary."""

    def __init__(self, config: ModelConfig, dtype: DType) -> None:
        super().__init__()
        self.weight = weight(dtype, config.vocab_size, config.hidden_size)
        self.dtype = dtype

    def forward(self, op: OpBuilder, input_ids: ir.Value, rank: ir.Value | None = None) -> ir.Value:
        """int64 [T] → [T, H]."""
        if rank is None:
            return call(op, EMBEDDING, input_ids, self.weight, dtype=self.dtype.onnx)
        own = ids_of_rank(op, input_ids, rank, self.weight.shape[0])
        return call(op, ALL_REDUCE, call(op, EMBEDDING, own, self.weight, dtype=self.dtype.onnx))


class DecoderLayer(nn.Module):  # type: ignore[misc]
    """`model.layers.N`: pre-norm attention and MLP on a residual stream.

    What a block adds is handed on as `delta` and added by the next norm, so that addition and norm are one operator.
    """

    def __init__(self, config: ModelConfig, precision: Precision, index: int) -> None:
        super().__init__()
        self.input_layernorm = ResidualNorm(config, precision, precision.quantized)
        self.attention = Attention(config, precision)
        self.post_attention_layernorm = ResidualNorm(config, precision, precision.quantized)
        self.mlp = SparseMLP(config, precision) if config.is_moe_layer(index) else DenseMLP(config, precision)

    def forward(
        self,
        op: OpBuilder,
        residual: ir.Value,
        delta: ir.Value | None,
        step: Step,
        rope: tuple[ir.Value, ir.Value],
        pool: ir.Value,
    ) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value]:
        """residual, delta [T, H] → (residual, delta, pool, the residual stream as it came in)."""
        entered, normed = self.input_layernorm(op, residual, delta)
        delta, pool = self.attention(op, normed.for_matmul, step, rope, pool)
        residual, normed = self.post_attention_layernorm(op, entered, delta)
        return residual, self.mlp(op, normed, step.num_tokens), pool, entered


@dataclass(frozen=True)
class Streams:
    """The residual stream behind every layer; behind the last one as two parts that nothing else adds up."""

    between: tuple[ir.Value, ...]  # [T, H] after layers 0 to N − 2
    residual: ir.Value  # [T, H]
    delta: ir.Value  # [T, H]

    def after(self, op: OpBuilder, layer: int) -> ir.Value:
        """[T, H] after `layer`, counted from 0."""
        return self.between[layer] if layer < len(self.between) else op.Add(self.residual, self.delta)


class Transformer(nn.Module):  # type: ignore[misc]
    """`model`: embedding, layers, final norm."""

    def __init__(self, config: ModelConfig, precision: Precision) -> None:
        super().__init__("model")
        self.word_embeddings = Embedding(config, precision.activation)
        self.layers = nn.ModuleList([DecoderLayer(config, precision, i) for i in range(config.num_hidden_layers)])
        self.norm = ResidualNorm(config, precision, quantize=False)  # the head is not quantised

    def forward(
        self, op: OpBuilder, step: Step, rope: tuple[ir.Value, ir.Value], pools: Sequence[ir.Value]
    ) -> tuple[ir.Value, list[ir.Value], Streams]:
        """T tokens → (normed hidden states of the R rows that want logits [R, H], the written pools, the streams)."""
        residual, delta = self.word_embeddings(op, step.input_ids, step.rank), None
        written, entered = [], []
        for layer, pool in zip(self.layers, pools, strict=True):
            residual, delta, pool_out, stream = layer(op, residual, delta, step, rope, pool)
            written.append(pool_out)
            entered.append(stream)
        assert delta is not None  # a model has at least one layer
        wanted = [op.Gather(value, step.logit_indices, axis=0) for value in (residual, delta)]
        for value, name in zip(wanted, ("residual", "delta"), strict=True):
            value.name = f"wanted.{name}"
        _, normed = self.norm(op, *wanted)
        return normed.plain, written, Streams(tuple(entered[1:]), residual, delta)


class CausalLM(nn.Module):  # type: ignore[misc]
    """The whole model: rope tables, transformer, head; with a draft also the projection that feeds it.

    With several ranks one rank's part of it: `config` then has the sizes of a part (`angelforge.ranks`).
    """

    def __init__(
        self,
        config: ModelConfig,
        precision: Precision,
        max_context: int,
        draft: DraftConfig | None = None,
        ranks: int = 1,
    ) -> None:
        super().__init__("")
        self.ranks, self.width = ranks, config.vocab_size
        self.rope = Rope(max_context, config.rotary_dim)
        self.model = Transformer(config, precision)
        self.lm_head = Projection(config.hidden_size, config.vocab_size, precision.activation, DType.F32)
        self.draft = None if draft is None else CapturedStates(draft, precision)

    def forward(
        self, op: OpBuilder, step: Step, pools: Sequence[ir.Value]
    ) -> tuple[ir.Value, list[ir.Value], ir.Value | None]:
        """→ (logits f32 [R, vocab], the written pools, the draft's input [T, H])."""
        normed, written, streams = self.model(op, step, self.rope(op), pools)
        hidden = None if self.draft is None else self.draft(op, streams.after)
        logits = self.lm_head(op, normed)
        if step.rank is not None:
            logits = logits_of_all(op, logits, step.rank, self.ranks, self.width)
        return logits, written, hidden
