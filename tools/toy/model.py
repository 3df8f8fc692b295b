"""BailingMoeV2 in torch, to be trained: modules and parameters are named as in a checkpoint (MODEL.md, mathematics)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from angelforge.config import ModelConfig
from angelforge.rope import rope_tables


class RMSNorm(nn.Module):  # type: ignore[misc]
    """x / √(mean(x²) + ε) · weight."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """[.., size] → [.., size]."""
        return functional.rms_norm(x, self.weight.shape, self.weight, self.epsilon)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on the first dims of [B, heads, T, D] in pairs (i, i + R/2); cos and sin [T, R/2]."""
    half = cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


class MLP(nn.Module):  # type: ignore[misc]
    """down(silu(gate(x)) · up(x))."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[.., H] → [.., H]."""
        down: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return down


class Attention(nn.Module):  # type: ignore[misc]
    """Grouped-query attention with QK-norm and partial RoPE."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        size = config.num_attention_heads * config.head_dim
        self.query_key_value = nn.Linear(config.hidden_size, config.qkv_size, bias=False)
        self.query_layernorm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.key_layernorm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.dense = nn.Linear(size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, T, H] → [B, T, H]."""
        heads, kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        batch, length, _ = x.shape
        fused = self.query_key_value(x).view(batch, length, -1, self.config.head_dim).transpose(1, 2)
        query, key, value = fused.split([heads, kv_heads, kv_heads], dim=1)
        query = rotate(self.query_layernorm(query), cos, sin)
        key = rotate(self.key_layernorm(key), cos, sin)
        key, value = (part.repeat_interleave(heads // kv_heads, dim=1) for part in (key, value))
        out = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        dense: Tensor = self.dense(out.transpose(1, 2).reshape(batch, length, -1))
        return dense


class Router(nn.Module):  # type: ignore[misc]
    """Sigmoid routing limited to groups; the bias decides who is chosen and never how much it counts."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.register_buffer("expert_bias", torch.zeros(config.num_experts))
        self.load = torch.zeros(config.num_experts)  # tokens of each expert in the last call

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[T, H] → (expert ids [T, k], weights [T, k])."""
        config = self.config
        scores = functional.linear(x, self.weight).sigmoid()
        with torch.no_grad():
            biased = (scores + self.expert_bias).view(len(x), config.n_group, -1)
            best = biased.topk(2, dim=-1).values.sum(-1).topk(config.topk_group, dim=-1).indices
            kept = torch.zeros(biased.shape[:2], dtype=torch.bool).scatter_(1, best, True)
            masked = biased.masked_fill(~kept[..., None], -torch.inf).flatten(1)
            ids = masked.topk(config.num_experts_per_tok, dim=-1).indices
            self.load = torch.bincount(ids.flatten(), minlength=config.num_experts).float()
        chosen = scores.gather(1, ids)
        return ids, chosen / (chosen.sum(-1, keepdim=True) + 1e-20) * config.routed_scaling_factor


class SparseMLP(nn.Module):  # type: ignore[misc]
    """Router, routed experts and the shared expert."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, width = config.hidden_size, config.moe_intermediate_size
        self.gate = Router(config)
        self.experts = nn.ModuleList([MLP(hidden, width) for _ in range(config.num_experts)])
        self.shared_experts = MLP(hidden, width * config.num_shared_experts)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, H] → [B, T, H]."""
        flat = x.flatten(0, 1)
        ids, weights = self.gate(flat)
        out = self.shared_experts(flat)
        for index, expert in enumerate(self.experts):
            rows, places = (ids == index).nonzero(as_tuple=True)
            if len(rows):
                out = out.index_add(0, rows, expert(flat[rows]) * weights[rows, places, None])
        return out.view_as(x)


class DecoderLayer(nn.Module):  # type: ignore[misc]
    """One pre-norm layer."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        moe = config.is_moe_layer(index)
        self.mlp = SparseMLP(config) if moe else MLP(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, T, H] → [B, T, H]."""
        x = x + self.attention(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):  # type: ignore[misc]
    """`model` of the checkpoint."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([DecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class ToyModel(nn.Module):  # type: ignore[misc]
    """The whole model; `state_dict` has the names and shapes of a checkpoint."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Transformer(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        tables: tuple[Any, Any] = rope_tables(config, config.max_position_embeddings)
        self._cos, self._sin = (torch.from_numpy(table) for table in tables)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.5 * parameter.shape[1] ** -0.5)

    def forward(self, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        """ids [B, T] → (logits [B, T, vocab], the residual stream after each layer, each [B, T, H])."""
        length = ids.shape[1]
        cos, sin = self._cos[:length], self._sin[:length]
        x = self.model.word_embeddings(ids)
        streams = []
        for layer in self.model.layers:
            x = layer(x, cos, sin)
            streams.append(x)
        return self.lm_head(self.model.norm(x)), streams

    def routers(self) -> list[Router]:
        """The routers of all layers with experts."""
        return [module for module in self.modules() if isinstance(module, Router)]
