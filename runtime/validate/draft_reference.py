"""An independent reference of an EAGLE3 draft in plain NumPy: one sequence, one step at a time, no pages.

Written from MODEL.md ("EAGLE3 draft"); like `reference` it shares no code with the product.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from angelforge.runtime.validate.reference import Trace, causal_attention, rms_norm, rotate, sigmoid

Array = NDArray[Any]


@dataclass(frozen=True)
class DraftStep:
    """What one step computed for its T positions."""

    logits: Array  # [T, draft vocabulary]
    hidden: Array  # [T, hidden], what the next step takes
    keys: Array  # [positions, kv_heads, head_dim] of all positions so far: what a cache holds
    values: Array  # [positions, kv_heads, head_dim]


class DraftReference:
    """The draft, computed in `dtype`; it remembers keys and values of the positions it has seen."""

    def __init__(
        self,
        config: Mapping[str, Any],
        tensors: Callable[[str], Array],
        embedding: Array,
        dtype: type[np.floating[Any]] = np.float64,
    ) -> None:
        """`config` is the draft's config.json, `embedding` [vocab, hidden] the target's."""
        self.config = config
        self.dtype = np.dtype(dtype)
        self.embedding = embedding
        self.heads: int = config["num_attention_heads"]
        self.kv_heads: int = config.get("num_key_value_heads") or self.heads
        self.head_dim: int = config.get("head_dim") or config["hidden_size"] // self.heads
        self._tensors = tensors
        self._keys = self._values = np.zeros((0, self.kv_heads, self.head_dim), self.dtype)

    def target_ids(self) -> Array:
        """int64 [draft vocabulary]: the target's id of every draft token."""
        offsets = np.asarray(self._tensors("d2t"))
        return np.arange(len(offsets)) + offsets

    def captured_layers(self, layers: int) -> list[int]:
        """The target's layers whose states are taken, of a target with so many layers."""
        named = (self.config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
        return list(named) if named else [1, layers // 2 - 1, layers - 4]

    def first_hidden(self, trace: Trace) -> Array:
        """[T, hidden] = fc(the residual streams after the captured layers), from what the target's reference traced."""
        layers = self.captured_layers(len(trace.residuals) - 1)
        return self.project([trace.residuals[layer + 1] for layer in layers])

    def project(self, states: Sequence[Array]) -> Array:
        """[T, hidden] = fc(the captured states [T, H] side by side), each normed where the draft has `fc_norm`."""
        states = [state.astype(self.dtype) for state in states]
        if self.config.get("fc_norm"):
            states = [self._norm(state, f"fc_norm.{i}.weight") for i, state in enumerate(states)]
        return self._linear(np.concatenate(states, axis=1), "fc.weight")

    def step(self, next_ids: Sequence[int] | Array, hidden: Array, start: int) -> DraftStep:
        """Positions from `start` on: each sees the token after it (`next_ids` [T]) and a state (`hidden` [T, H]).

        What was remembered of these positions and later ones is forgotten.
        """
        self._keys, self._values = self._keys[:start], self._values[:start]
        return self._pass(next_ids, hidden, np.arange(start, start + len(next_ids)))

    def apart(self, next_ids: Array, hidden: Array, sequences: Array) -> DraftStep:
        """One step of several sequences side by side from their beginnings on; nothing is remembered.

        `sequences` [T] tells whose each token is; those of one stand together.
        """
        _, first, inverse = np.unique(sequences, return_index=True, return_inverse=True)
        self._keys, self._values = self._keys[:0], self._values[:0]
        made = self._pass(next_ids, hidden, np.arange(len(next_ids)) - first[inverse], sequences)
        self._keys, self._values = self._keys[:0], self._values[:0]
        return made

    def _pass(
        self, next_ids: Sequence[int] | Array, hidden: Array, positions: Array, sequences: Array | None = None
    ) -> DraftStep:
        ids = np.asarray(next_ids, np.int64)
        residual = np.asarray(hidden, self.dtype)
        x = np.concatenate(
            [
                self._norm(self.embedding[ids].astype(self.dtype), "midlayer.input_layernorm.weight"),
                self._norm(residual, "midlayer.hidden_norm.weight"),
            ],
            axis=1,
        )
        h = residual + self._attention(x, positions, sequences)
        h = h + self._mlp(self._norm(h, "midlayer.post_attention_layernorm.weight"))
        normed = self._norm(h, "norm.weight")
        logits = self._linear(normed, "lm_head.weight")
        passed_on = normed if self.config.get("norm_output") else h
        return DraftStep(logits, passed_on, self._keys, self._values)

    def chain(self, ids: Sequence[int] | Array, hidden: Array, depth: int) -> list[int]:
        """The `depth` tokens (target ids) that the draft expects after `ids` [n + 1], greedily.

        `hidden` [n, H] are the target's captured states of all of `ids` but the last, projected by `fc`.
        """
        ids = list(ids)
        names = self.target_ids()
        made = self.step(ids[1:], hidden, 0)
        guessed: list[int] = []
        for _ in range(depth):
            guessed.append(int(names[made.logits[-1].argmax()]))
            if len(guessed) < depth:
                made = self.step(guessed[-1:], made.hidden[-1:], len(ids) - 2 + len(guessed))
        return guessed

    def _attention(self, x: Array, positions: Array, sequences: Array | None) -> Array:
        def heads(part: str) -> Array:
            return self._linear(x, f"midlayer.self_attn.{part}_proj.weight").reshape(len(x), -1, self.head_dim)

        elsewhere = (self.config.get("rope_parameters") or {}).get("rope_theta")
        theta = float(self.config.get("rope_theta") or elsewhere or 10000.0)
        pairs = np.arange(self.head_dim // 2)
        angles = positions[:, None] * theta ** (-2.0 * pairs / self.head_dim)
        cos, sin = np.cos(angles).astype(self.dtype), np.sin(angles).astype(self.dtype)
        query, key = rotate(heads("q"), cos, sin), rotate(heads("k"), cos, sin)
        before = len(self._keys)
        self._keys, self._values = np.concatenate([self._keys, key]), np.concatenate([self._values, heads("v")])
        # The queries come after `before` others: empty ones stand for those, and their results are dropped.
        padded = np.concatenate([np.zeros((before, *query.shape[1:]), self.dtype), query])
        out = causal_attention(padded, self._keys, self._values, np.arange(len(padded)), sequences)[before:]
        return self._linear(out.reshape(len(x), -1), "midlayer.self_attn.o_proj.weight")

    def _mlp(self, x: Array) -> Array:
        gate = self._linear(x, "midlayer.mlp.gate_proj.weight")
        up = self._linear(x, "midlayer.mlp.up_proj.weight")
        return self._linear(gate * sigmoid(gate) * up, "midlayer.mlp.down_proj.weight")

    def _linear(self, x: Array, name: str) -> Array:
        """x · Wᵀ; in a subclass rounded as the draft's precision says."""
        return np.asarray(x @ self._tensor(name).T)

    def _norm(self, x: Array, name: str) -> Array:
        return rms_norm(x, self._tensor(name), self.config.get("rms_norm_eps") or 1e-6)

    def _tensor(self, name: str) -> Array:
        return np.asarray(self._tensors(name)).astype(self.dtype)
