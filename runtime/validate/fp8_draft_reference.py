"""The reference of a draft in FP8: rounded as `fp8_reference` rounds, in f64 between, with no code of the product."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from angelforge.runtime.validate.draft_reference import DraftReference
from angelforge.runtime.validate.fp8_reference import quantised_activation, quantised_weight

Array = NDArray[Any]

_ATTENTION = {f"midlayer.self_attn.{part}_proj.weight": part for part in "qkv"}


class Fp8DraftReference(DraftReference):
    """The draft as an FP8 bundle computes it, from the tensors of any draft's checkpoint.

    The projections of its layer are quantised; `fc`, head, embedding and norms are not. What the attention reads, the
    token beside the state, is quantised half by half, and so are the columns of q, k and v, one below the other.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        tensors: Callable[[str], Array],
        embedding: Array,
        dtype: type[np.floating[Any]] = np.float64,
    ) -> None:
        """As `DraftReference`; FP8 weights are given dequantised."""
        super().__init__(config, tensors, embedding, dtype)
        self._stored = config.get("quantization_config") is not None
        self._made: dict[str, Array] = {}

    def _linear(self, x: Array, name: str) -> Array:
        if not name.startswith("midlayer."):
            return super()._linear(x, name)
        parts = np.split(x, 2, axis=1) if name in _ATTENTION else [x]
        rounded = np.concatenate([quantised_activation(part) for part in parts], axis=1)
        return np.asarray(rounded @ self._weight(name).T)

    def _weight(self, name: str) -> Array:
        if self._stored:
            return self._tensor(name)
        if name not in self._made:
            names = list(_ATTENTION) if name in _ATTENTION else [name]
            weights = [self._tensor(each) for each in names]
            whole = np.concatenate(weights)
            halves = np.split(whole, 2, axis=1) if name in _ATTENTION else [whole]
            rounded = np.concatenate([quantised_weight(half) for half in halves], axis=1).astype(self.dtype)
            ends = np.cumsum([len(weight) for weight in weights])
            self._made |= dict(zip(names, np.split(rounded, ends[:-1]), strict=True))
        return self._made[name]
