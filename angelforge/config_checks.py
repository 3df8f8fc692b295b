"""Relations between the sizes of a model: what must divide what, and what must fit in what."""

from __future__ import annotations

from typing import TYPE_CHECKING

from angelforge.errors import AngelForgeError

if TYPE_CHECKING:
    from angelforge.config import ModelConfig


def check_relations(c: ModelConfig) -> None:
    """Raises AngelForgeError with the first relation that `c` breaks; the message names the keys and their values."""
    per_group = c.num_experts // c.n_group
    rules = (
        (c.rope_theta > 1.0, f"rope_theta {c.rope_theta:g} must be greater than 1"),
        (
            c.num_attention_heads % c.num_key_value_heads == 0,
            f"num_attention_heads {c.num_attention_heads} must be a multiple of "
            f"num_key_value_heads {c.num_key_value_heads}",
        ),
        (
            c.rotary_dim % 2 == 0 and 2 <= c.rotary_dim <= c.head_dim,
            f"rotary_dim {c.rotary_dim} must be even and at most head_dim {c.head_dim}",
        ),
        (
            c.first_k_dense_replace <= c.num_hidden_layers,
            f"first_k_dense_replace {c.first_k_dense_replace} must be at most num_hidden_layers {c.num_hidden_layers}",
        ),
        (
            c.num_experts % c.n_group == 0,
            f"num_experts {c.num_experts} must be a multiple of n_group {c.n_group}",
        ),
        (
            per_group >= 2,
            f"num_experts {c.num_experts} in n_group {c.n_group} groups must be at least 2 a group: "
            "a group's score is the sum of its two best",
        ),
        (c.topk_group <= c.n_group, f"topk_group {c.topk_group} must be at most n_group {c.n_group}"),
        (
            c.num_experts_per_tok <= c.topk_group * per_group,
            f"num_experts_per_tok {c.num_experts_per_tok} must be at most the experts in topk_group {c.topk_group} "
            f"groups of {per_group}",
        ),
    )
    for holds, message in rules:
        if not holds:
            raise AngelForgeError(f"The model configuration is inconsistent: {message}.")
