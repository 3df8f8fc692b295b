"""What of each stored weight a rank takes: `slices`. The weight files are the same for any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from angelforge.config import ModelConfig
from angelforge.precision import Precision
from angelforge.ranks import BLOCK, rank_config
from angelforge.runtime.weight_layout import Slice, Slices

_SCALE = "_scale_inv"  # appended to the name of a quantised weight


def slices(config: ModelConfig, precision: Precision, rank: int, ranks: int) -> Slices:
    """The slices of one of `ranks` ranks (counted from 0), by the names of the bundle; the rest is taken whole.

    Block scales are cut where their weights are. Nothing is cut for one rank.

    Raises:
        UsageError: the model cannot be split over so many ranks.
    """
    if ranks == 1:
        return {}
    found: dict[str, Sequence[Slice]] = {}
    for name, cut in _weights(config, rank_config(config, precision, ranks), rank, ranks):
        found[name] = cut
        if precision.quantized and name.startswith("model.layers."):
            found[name + _SCALE] = [Slice(one.axis, one.start // BLOCK, -(-one.stop // BLOCK)) for one in cut]
    return found


def _weights(whole: ModelConfig, part: ModelConfig, rank: int, ranks: int) -> Iterator[tuple[str, Sequence[Slice]]]:
    """Every weight of the model that is cut: `part` has the sizes of a rank's share."""
    for name in ("model.word_embeddings.weight", "lm_head.weight"):
        yield name, [_share(0, part.vocab_size, rank)]
    for layer in range(whole.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.attention.query_key_value.weight", _heads(whole, part, rank, ranks)
        yield f"{prefix}.attention.dense.weight", [_share(1, part.num_attention_heads * part.head_dim, rank)]
        if whole.is_moe_layer(layer):  # [experts, I, H], down [experts, H, I]
            width, axis, mlp = part.moe_intermediate_size, 1, f"{prefix}.mlp.experts"
        else:
            width, axis, mlp = part.intermediate_size, 0, f"{prefix}.mlp"
        yield f"{mlp}.gate_proj.weight", [_share(axis, width, rank)]
        yield f"{mlp}.up_proj.weight", [_share(axis, width, rank)]
        yield f"{mlp}.down_proj.weight", [_share(axis + 1, width, rank)]


def _share(axis: int, size: int, rank: int) -> Slice:
    return Slice(axis, rank * size, (rank + 1) * size)


def _heads(whole: ModelConfig, part: ModelConfig, rank: int, ranks: int) -> list[Slice]:
    """Rows of the fused projection: a rank's queries, and the keys and values of the heads that these look at."""
    size = whole.head_dim
    queries, pairs = part.num_attention_heads * size, part.num_key_value_heads * size
    copies = max(ranks // whole.num_key_value_heads, 1)  # ranks that hold the same key/value head
    keys = whole.num_attention_heads * size + rank // copies * pairs
    values = keys + whole.num_key_value_heads * size
    return [
        Slice(0, rank * queries, (rank + 1) * queries),
        Slice(0, keys, keys + pairs),
        Slice(0, values, values + pairs),
    ]
