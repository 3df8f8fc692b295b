"""The tensors that a draft adds to a bundle, and what of its checkpoint each is made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from angelforge.draft_checkpoint import DraftCheckpoint
from angelforge.draft_config import DraftConfig
from angelforge.dtypes import DType
from angelforge.errors import AngelForgeError
from angelforge.exporter.layout import matmul_tensors
from angelforge.exporter.pieces import DRAFT, BundleTensor, Piece, Range, RopeTable
from angelforge.precision import Precision
from angelforge.tensorfile import TensorInfo

_ATTENTION = DRAFT + "midlayer.self_attn."


def draft_tensors(draft: DraftConfig, precision: Precision, max_context: int) -> list[BundleTensor]:
    """All tensors of a draft in a bundle of `precision`; its embedding is the target's.

    `draft` is the checkpoint's own: with precision fp8, FP8 weights are taken as they are, others are quantised. `t2d`
    is left out: it says nothing that `d2t` does not. Raises AngelForgeError where stored scales cannot be stacked.
    """
    hidden, width = draft.hidden_size, draft.intermediate_size
    norms = [f"fc_norm.{i}.weight" for i in range(len(draft.capture_layers))] if draft.fc_norm else []
    norms += [f"midlayer.{name}.weight" for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm")]
    table = (max_context, draft.rotary_dim // 2)
    vocabulary = (draft.draft_vocab_size,)

    def plain(name: str, *shape: int) -> BundleTensor:
        return BundleTensor(DRAFT + name, precision.activation, shape, (Piece(DRAFT + name, shape),))

    def linear(name: str, *shape: int) -> Iterator[BundleTensor]:
        name = DRAFT + name
        return matmul_tensors(name, shape, (Piece(name, shape),), precision, draft.quantization)

    return [
        plain("fc.weight", hidden, draft.captured_size),
        *(plain(name, hidden) for name in (*norms, "norm.weight")),
        *_qkv(draft, precision),
        *linear("midlayer.self_attn.o_proj.weight", hidden, draft.num_attention_heads * draft.head_dim),
        *linear("midlayer.mlp.gate_proj.weight", width, hidden),
        *linear("midlayer.mlp.up_proj.weight", width, hidden),
        *linear("midlayer.mlp.down_proj.weight", hidden, width),
        plain("lm_head.weight", draft.draft_vocab_size, hidden),
        BundleTensor(DRAFT + "rope.cos", DType.F32, table, RopeTable(draft, "cos")),
        BundleTensor(DRAFT + "rope.sin", DType.F32, table, RopeTable(draft, "sin")),
        BundleTensor(DRAFT + "d2t", DType.I64, vocabulary, (Piece(DRAFT + "d2t", vocabulary),)),
    ]


def require_stackable(draft: DraftConfig, precision: Precision) -> None:
    """Raises AngelForgeError for an FP8 draft whose scales of q, k and v are no blocks of the one matrix of a bundle.

    `draft` is the checkpoint's own.
    """
    if not precision.quantized or draft.quantization is None:
        return
    block = draft.quantization.block[0]
    queries, pairs = (n * draft.head_dim for n in (draft.num_attention_heads, draft.num_key_value_heads))
    for name, size in {"hidden_size": draft.hidden_size, "query rows": queries, "key rows": pairs}.items():
        if size % block:
            raise AngelForgeError(
                f"The draft is FP8 and its {name} are {size}, which is no multiple of the scale block ({block}), so "
                "the scales of its q, k and v projections cannot be stacked. Use --precision bf16, or an unquantised "
                "draft."
            )


def _qkv(draft: DraftConfig, precision: Precision) -> Iterator[BundleTensor]:
    """q, k and v below each other; in FP8 the columns for the token apart from those for the state (see `draft.py`)."""
    hidden = draft.hidden_size
    queries, pairs = (n * draft.head_dim for n in (draft.num_attention_heads, draft.num_key_value_heads))

    def stacked(name: str, columns: Range | None, inputs: int) -> Iterator[BundleTensor]:
        pieces = tuple(
            Piece(f"{_ATTENTION}{part}_proj.weight", (rows, 2 * hidden), columns=columns)
            for part, rows in (("q", queries), ("k", pairs), ("v", pairs))
        )
        shape = (draft.qkv_size, inputs)
        return matmul_tensors(_ATTENTION + name, shape, pieces, precision, draft.quantization, joined=True)

    if not precision.quantized:
        yield from stacked("qkv_proj.weight", None, 2 * hidden)
        return
    require_stackable(draft, precision)
    yield from stacked("qkv_proj.token.weight", (0, hidden), hidden)
    yield from stacked("qkv_proj.state.weight", (hidden, 2 * hidden), hidden)


def draft_sources(draft: DraftCheckpoint) -> Mapping[str, TensorInfo]:
    """The tensors of a draft's checkpoint under the names that `draft_tensors` calls them by."""
    return {DRAFT + name: replace(info, name=DRAFT + name) for name, info in draft.tensors.items()}
