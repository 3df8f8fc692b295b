"""An EAGLE3 draft in torch, trained as it will be used: step after step on its own states (arXiv 2503.01840, 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from angelforge.draft_config import DraftConfig
from angelforge.tools.toy.model import MLP, RMSNorm, rotate


class DraftAttention(nn.Module):  # type: ignore[misc]
    """Llama attention whose input is twice as wide; one object for all steps of a chain."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.config = config
        hidden, size = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(2 * hidden, config.num_attention_heads * size, bias=False)
        self.k_proj = nn.Linear(2 * hidden, config.num_key_value_heads * size, bias=False)
        self.v_proj = nn.Linear(2 * hidden, config.num_key_value_heads * size, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * size, hidden, bias=False)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, 2H] → query, key, value, each [B, heads, T, D]."""
        sharing = self.config.num_attention_heads // self.config.num_key_value_heads

        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)

        query, key = rotate(heads(self.q_proj(x)), cos, sin), rotate(heads(self.k_proj(x)), cos, sin)
        value = heads(self.v_proj(x))
        return query, key.repeat_interleave(sharing, dim=1), value.repeat_interleave(sharing, dim=1)

    def attend(self, query: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        """Attention of the last step's queries → [B, T, H].

        A query at position j of step k sees what a chain that was begun k positions earlier sees: the first step's
        entries up to position j − k, and of each later step m the one entry at j − k + m.
        """
        step, length = len(keys) - 1, query.shape[2]
        scale = self.config.head_dim**-0.5
        place = torch.arange(length)
        hidden = place[None, :] > place[:, None] - step  # [T, T]
        scores = [(query @ keys[0].transpose(2, 3) * scale).masked_fill(hidden, -torch.inf)]
        for m in range(1, step + 1):
            scores.append((query * keys[m].roll(step - m, dims=2)).sum(-1, keepdim=True) * scale)
        shares = torch.cat(scores, dim=-1).softmax(dim=-1)  # [B, heads, T, T + step]
        out = shares[..., :length] @ values[0]
        for m in range(1, step + 1):
            out = out + shares[..., length + m - 1, None] * values[m].roll(step - m, dims=2)
        projected: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return projected


class DraftLayer(nn.Module):  # type: ignore[misc]
    """`midlayer` of the checkpoint."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.self_attn = DraftAttention(config)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)
        for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm"):
            setattr(self, name, RMSNorm(config.hidden_size, config.rms_norm_eps))


class ToyDraft(nn.Module):  # type: ignore[misc]
    """The whole draft; `state_dict` has the names and shapes of a checkpoint, d2t and t2d included."""

    def __init__(self, config: DraftConfig, target_ids: Tensor) -> None:
        """`target_ids` int64 [draft vocabulary], ascending: the tokens that can be proposed."""
        super().__init__()
        self.config = config
        self.fc = nn.Linear(config.captured_size, config.hidden_size, bias=False)
        self.midlayer = DraftLayer(config)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        self.register_buffer("d2t", target_ids - torch.arange(len(target_ids)))
        known = torch.zeros(config.vocab_size, dtype=torch.bool)
        known[target_ids] = True
        self.register_buffer("t2d", known)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.5 * parameter.shape[1] ** -0.5)

    def forward(self, captured: Tensor, embeddings: Tensor, steps: int) -> list[Tensor]:
        """Logits [B, T, draft vocabulary] of every step for the token two positions on.

        `captured` [B, T, captured_size] are the target's states, `embeddings` [B, T, H] those of the next tokens. Row
        j of step k belongs to a chain that was begun at j − k; where j < k there is none and the row means nothing.
        """
        cos, sin = self._tables(captured.shape[1])
        layer = self.midlayer
        hidden, normed = self.fc(captured), layer.input_layernorm(embeddings)
        keys: list[Tensor] = []
        values: list[Tensor] = []
        logits = []
        for _ in range(steps):
            query, key, value = layer.self_attn.project(torch.cat([normed, layer.hidden_norm(hidden)], -1), cos, sin)
            keys.append(key)
            values.append(value)
            hidden = hidden + layer.self_attn.attend(query, keys, values)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
            logits.append(self.lm_head(self.norm(hidden)))
            hidden = hidden.roll(1, dims=1)  # what was made at j − 1 stands for the target's state at j
        return logits

    def _tables(self, length: int) -> tuple[Tensor, Tensor]:
        pairs = torch.arange(self.config.head_dim // 2, dtype=torch.float64)
        frequencies = self.config.rope_theta ** (-2 * pairs / self.config.head_dim)
        angles = torch.arange(length)[:, None] * frequencies
        return angles.cos().float(), angles.sin().float()
