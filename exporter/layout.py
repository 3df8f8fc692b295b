"""The tensors of a bundle, kernel-ready, and what of the checkpoint each is made of; from the configuration alone.

Routed and shared experts form one stack: a `shared_experts` MLP of width S·I is S experts of width I, because its down
projection is a sum over the width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from angelforge.config import ModelConfig, Quantization
from angelforge.dtypes import DType
from angelforge.errors import AngelForgeError
from angelforge.exporter.pieces import BundleTensor, Piece, Quantized, Range, RopeTable, SameBytes, Shape
from angelforge.exporter.placement import Location, Shard, locate, plan_shards
from angelforge.precision import Precision

__all__ = ["BundleTensor", "Location", "Shard", "bundle_tensors", "locate", "plan_shards"]

SCALE = "_scale_inv"  # appended to a quantised weight's name, in checkpoints and bundles


def bundle_tensors(config: ModelConfig, precision: Precision, max_context: int) -> list[BundleTensor]:
    """All tensors of a bundle, in the order embeddings, layers, head.

    `config` is the checkpoint's own: with precision fp8, the weights of an FP8 checkpoint are taken as they are, those
    of any other are quantised. Raises AngelForgeError where stored scales of shared experts cannot be taken apart.
    """
    _check(config, precision)
    layout = _Layout(config, precision)
    tensors = [*layout.embeddings(max_context)]
    for layer in range(config.num_hidden_layers):
        tensors += layout.layer(layer)
    return [*tensors, *layout.head()]


def _check(config: ModelConfig, precision: Precision) -> None:
    if not precision.quantized or config.quantization is None:
        return
    width, block = config.moe_intermediate_size, max(config.quantization.block)
    if config.num_shared_experts > 1 and width % block:
        raise AngelForgeError(
            f"The {config.num_shared_experts} shared experts are {width} wide, which is no multiple of the FP8 scale "
            f"block ({block}), so their scales cannot be taken apart. Use --precision bf16."
        )


@dataclass(frozen=True)
class _Layout:
    config: ModelConfig
    precision: Precision

    def embeddings(self, max_context: int) -> Iterator[BundleTensor]:
        """Embedding and rope tables."""
        c = self.config
        yield self._plain("model.word_embeddings.weight", (c.vocab_size, c.hidden_size))
        shape = (max_context, c.rotary_dim // 2)
        yield BundleTensor("rope.cos", DType.F32, shape, RopeTable(c, "cos"))
        yield BundleTensor("rope.sin", DType.F32, shape, RopeTable(c, "sin"))

    def layer(self, index: int) -> Iterator[BundleTensor]:
        """One decoder layer."""
        c, prefix = self.config, f"model.layers.{index}"
        yield self._plain(f"{prefix}.input_layernorm.weight", (c.hidden_size,))
        yield self._plain(f"{prefix}.post_attention_layernorm.weight", (c.hidden_size,))
        if c.use_qk_norm:
            yield self._plain(f"{prefix}.attention.query_layernorm.weight", (c.head_dim,))
            yield self._plain(f"{prefix}.attention.key_layernorm.weight", (c.head_dim,))
        yield from self._linear(f"{prefix}.attention.query_key_value.weight", (c.qkv_size, c.hidden_size))
        yield from self._linear(f"{prefix}.attention.dense.weight", (c.hidden_size, c.num_attention_heads * c.head_dim))
        yield from self._experts(f"{prefix}.mlp") if c.is_moe_layer(index) else self._dense(f"{prefix}.mlp")

    def head(self) -> Iterator[BundleTensor]:
        """Final norm and head."""
        c = self.config
        yield self._plain("model.norm.weight", (c.hidden_size,))
        head = self._plain("lm_head.weight", (c.vocab_size, c.hidden_size))
        if c.tie_word_embeddings:
            head = BundleTensor(head.name, head.dtype, head.shape, SameBytes("model.word_embeddings.weight"))
        yield head

    def _plain(self, name: str, shape: Shape, dtype: DType | None = None) -> BundleTensor:
        return BundleTensor(name, dtype or self.precision.activation, shape, (Piece(name, shape),))

    def _linear(self, name: str, shape: Shape) -> Iterator[BundleTensor]:
        yield from self._quantized(name, shape, (Piece(name, shape),))

    def _dense(self, prefix: str) -> Iterator[BundleTensor]:
        hidden, width = self.config.hidden_size, self.config.intermediate_size
        yield from self._linear(f"{prefix}.gate_proj.weight", (width, hidden))
        yield from self._linear(f"{prefix}.up_proj.weight", (width, hidden))
        yield from self._linear(f"{prefix}.down_proj.weight", (hidden, width))

    def _experts(self, prefix: str) -> Iterator[BundleTensor]:
        c = self.config
        hidden, width = c.hidden_size, c.moe_intermediate_size
        # The router decides in f32 whatever the precision.
        yield self._plain(f"{prefix}.gate.weight", (c.num_experts, hidden), DType.F32)
        yield self._plain(f"{prefix}.gate.expert_bias", (c.num_experts,), DType.F32)
        yield from self._stack(prefix, "gate_proj", (width, hidden))
        yield from self._stack(prefix, "up_proj", (width, hidden))
        yield from self._stack(prefix, "down_proj", (hidden, width))

    def _stack(self, prefix: str, projection: str, shape: Shape) -> Iterator[BundleTensor]:
        """The projection of all routed experts, then that of the slices of the shared one."""
        c, suffix = self.config, f"{projection}.weight"
        pieces = [Piece(f"{prefix}.experts.{expert}.{suffix}", shape) for expert in range(c.num_experts)]
        shared = f"{prefix}.shared_experts.{suffix}"
        for index in range(c.num_shared_experts):
            cut = (index * c.moe_intermediate_size, (index + 1) * c.moe_intermediate_size)
            if projection == "down_proj":
                pieces.append(Piece(shared, (shape[0], shape[1] * c.num_shared_experts), columns=cut))
            else:
                pieces.append(Piece(shared, (shape[0] * c.num_shared_experts, shape[1]), rows=cut))
        yield from self._quantized(f"{prefix}.experts.{suffix}", (c.num_expert_slots, *shape), tuple(pieces))

    def _quantized(self, name: str, shape: Shape, pieces: tuple[Piece, ...]) -> Iterator[BundleTensor]:
        return matmul_tensors(name, shape, pieces, self.precision, self.config.quantization)


def matmul_tensors(
    name: str,
    shape: Shape,
    pieces: tuple[Piece, ...],
    precision: Precision,
    stored: Quantization | None,
    joined: bool = False,
) -> Iterator[BundleTensor]:
    """A weight of a linear or of experts, and in FP8 its block scales: quantised, or as the checkpoint has `stored` it.

    Quantised pieces have blocks of their own, or, `joined`, those of the one matrix that they make. Stored ones must be
    cut at the borders of their blocks.
    """
    dtype = precision.matmul
    if not precision.quantized:
        yield BundleTensor(name, dtype, shape, pieces)
        return
    block = (stored or Quantization()).block
    scales = (*shape[:-2], *_blocks(shape, block))
    if stored is None:
        yield BundleTensor(name, dtype, shape, Quantized(pieces, "codes", block, joined))
        yield BundleTensor(name + SCALE, DType.F32, scales, Quantized(pieces, "scales", block, joined))
    else:
        yield BundleTensor(name, dtype, shape, pieces)
        yield BundleTensor(name + SCALE, DType.F32, scales, tuple(_scale_piece(piece, block) for piece in pieces))


def _blocks(shape: Shape, block: tuple[int, int]) -> Shape:
    return tuple(-(-size // step) for size, step in zip(shape[-2:], block, strict=True))


def _scale_piece(piece: Piece, block: tuple[int, int]) -> Piece:
    """The scales of a piece whose cuts stand at block borders."""

    def scaled(cut: Range | None, step: int) -> Range | None:
        return None if cut is None else (cut[0] // step, -(-cut[1] // step))

    shape = _blocks(piece.shape, block)
    return Piece(piece.tensor + SCALE, shape, scaled(piece.rows, block[0]), scaled(piece.columns, block[1]))
