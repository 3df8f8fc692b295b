"""The tensors that a draft adds to a bundle, and what of its checkpoint each is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from angelforge.draft_checkpoint import DraftCheckpoint
from angelforge.draft_config import DraftConfig
from angelforge.dtypes import DType
from angelforge.exporter.pieces import BundleTensor, Piece, RopeTable
from angelforge.precision import Precision
from angelforge.tensorfile import TensorInfo

PREFIX = "draft."  # before every name of a draft's checkpoint, in the bundle and as the source of its tensors

_QKV = "midlayer.self_attn.{}_proj.weight"


def draft_tensors(draft: DraftConfig, precision: Precision, max_context: int) -> list[BundleTensor]:
    """All tensors of a draft in a bundle of `precision`; its embedding is the target's.

    `t2d` is left out: it says nothing that `d2t` does not.
    """
    dtype = precision.draft.activation
    hidden, width = draft.hidden_size, draft.intermediate_size
    queries, pairs = (n * draft.head_dim for n in (draft.num_attention_heads, draft.num_key_value_heads))

    def plain(name: str, *shape: int) -> BundleTensor:
        return BundleTensor(PREFIX + name, dtype, shape, (Piece(PREFIX + name, shape),))

    stacked = tuple(
        Piece(PREFIX + _QKV.format(part), (rows, 2 * hidden))
        for part, rows in (("q", queries), ("k", pairs), ("v", pairs))
    )
    norms = [f"fc_norm.{i}.weight" for i in range(len(draft.capture_layers))] if draft.fc_norm else []
    norms += [f"midlayer.{name}.weight" for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm")]
    table = (max_context, draft.rotary_dim // 2)
    vocabulary = (draft.draft_vocab_size,)
    return [
        plain("fc.weight", hidden, draft.captured_size),
        *(plain(name, hidden) for name in (*norms, "norm.weight")),
        BundleTensor(PREFIX + _QKV.format("qkv"), dtype, (draft.qkv_size, 2 * hidden), stacked),
        plain(_QKV.format("o"), hidden, queries),
        plain("midlayer.mlp.gate_proj.weight", width, hidden),
        plain("midlayer.mlp.up_proj.weight", width, hidden),
        plain("midlayer.mlp.down_proj.weight", hidden, width),
        plain("lm_head.weight", draft.draft_vocab_size, hidden),
        BundleTensor(PREFIX + "rope.cos", DType.F32, table, RopeTable(draft, "cos")),
        BundleTensor(PREFIX + "rope.sin", DType.F32, table, RopeTable(draft, "sin")),
        BundleTensor(PREFIX + "d2t", DType.I64, vocabulary, (Piece(PREFIX + "d2t", vocabulary),)),
    ]


def draft_sources(draft: DraftCheckpoint) -> Mapping[str, TensorInfo]:
    """The tensors of a draft's checkpoint under the names that `draft_tensors` calls them by."""
    return {PREFIX + name: replace(info, name=PREFIX + name) for name, info in draft.tensors.items()}
