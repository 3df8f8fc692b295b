"""Logit bias: numbers that a request adds to the logits of a few ids."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np

from angelforge.errors import UsageError
from angelforge.runtime.batch import Float32, Int64

LARGEST = 100  # as OpenAI's API has it: enough to forbid a token, or to force it


class Bias(Mapping[int, float]):
    """A frozen mapping of ids to what is added to their logits; hashable, and at hand as two arrays."""

    def __init__(self, values: Mapping[int, float] | None = None) -> None:
        """Raises UsageError for anything but whole ids from 0 with finite numbers from −100 to 100."""
        if values is not None and not isinstance(values, Mapping):
            raise UsageError(f"logit_bias is {values!r}, but a mapping of token ids to numbers was expected.")
        pairs = dict(values or {})
        for token, value in pairs.items():
            if type(token) is not int or token < 0:  # type(): True is an int for isinstance
                raise UsageError(f"logit_bias holds the id {token!r}, but a whole number of at least 0 was expected.")
            if type(value) not in (int, float) or not math.isfinite(value) or abs(value) > LARGEST:
                raise UsageError(
                    f"logit_bias of id {token} is {value!r}, but a number from -{LARGEST} to {LARGEST} was expected."
                )
        self._pairs: dict[int, float] = {token: float(pairs[token]) for token in sorted(pairs)}
        self.ids: Int64 = np.array(list(self._pairs), np.int64)  # [n] rising
        self.values_f32: Float32 = np.array(list(self._pairs.values()), np.float32)  # [n]

    def __getitem__(self, token: int) -> float:
        return self._pairs[token]

    def __iter__(self) -> Iterator[int]:
        return iter(self._pairs)

    def __len__(self) -> int:
        return len(self._pairs)

    def __hash__(self) -> int:
        return hash(tuple(self._pairs.items()))

    def __repr__(self) -> str:
        return repr(self._pairs)

    def check(self, vocab_size: int) -> None:
        """Raises UsageError if an id is none of the vocabulary's."""
        if self._pairs and int(self.ids[-1]) >= vocab_size:
            raise UsageError(f"logit_bias holds the id {self.ids[-1]}, but the model's ids are 0 to {vocab_size - 1}.")
