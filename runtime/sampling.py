"""How the next token of a request is chosen: the parameters, and the distribution they make of a row of logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from angelforge.errors import UsageError
from angelforge.runtime.batch import Float32, Int64
from angelforge.runtime.selection import top_ids

Float64 = npt.NDArray[np.float64]

_NUCLEUS_GUESS = 256  # tokens that top-p looks at first; it looks at 16 times as many until they hold enough
_SMALLEST_DIVISOR = 1e-30  # a normal f32, so that a temperature below it does not become a division by zero


@dataclass(frozen=True)
class SamplingParams:
    """What a request asks for. The default is greedy decoding of up to 256 tokens.

    The rules apply in this order, each to what the one before left: repetition penalty, temperature, top-k, top-p,
    min-p. Raises UsageError naming the parameter if a value makes no sense.
    """

    max_tokens: int = 256  # ends the output at so many tokens, finish reason "length"
    temperature: float = 0.0  # logits are divided by it; 0 is greedy: the rules after the penalty do not matter
    top_k: int = 0  # keep the k most probable tokens, ties with the last included; 0 keeps all
    top_p: float = 1.0  # keep the fewest most probable tokens that hold this probability; 1 keeps all
    min_p: float = 0.0  # keep tokens at least this fraction as probable as the best; 0 keeps all
    repetition_penalty: float = (
        1.0  # positive logits of tokens seen in prompt or output are divided by it, others times it
    )
    seed: int | None = None  # equal seeds give equal outputs for equal prompts, whatever else runs; None: a fresh one
    stop: tuple[str, ...] = ()  # the output ends before the first of these strings
    stop_token_ids: tuple[int, ...] = ()  # end the output beside the model's own end tokens
    ignore_eos: bool = False  # do not end at the model's own end tokens

    def __post_init__(self) -> None:
        # A frozen object's own fields: a list or one string is what people write, a tuple is what is kept.
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else _tuple("stop", self.stop))
        object.__setattr__(self, "stop_token_ids", _tuple("stop_token_ids", self.stop_token_ids))
        _integer("max_tokens", self.max_tokens, 1)
        _integer("top_k", self.top_k, 0)
        if self.seed is not None:
            _integer("seed", self.seed, 0)
        _number("temperature", self.temperature, lambda value: value >= 0, "0 or more")
        _number("top_p", self.top_p, lambda value: 0 < value <= 1, "above 0 and at most 1")
        _number("min_p", self.min_p, lambda value: 0 <= value <= 1, "from 0 to 1")
        _number("repetition_penalty", self.repetition_penalty, lambda value: 0.01 <= value <= 100, "from 0.01 to 100")
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise UsageError(
                    f"stop holds {text!r}, but every stop string must be a text of at least one character."
                )
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, 0)

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always taken."""
        return self.temperature == 0.0


def candidates(logits: Float32, params: SamplingParams, history: Int64) -> tuple[Int64, Float64]:
    """The tokens that can come next and their probabilities: (ids [n], probabilities [n], summing to 1).

    `logits` f32 [vocab] is not changed; `history` [m] holds the ids of prompt and output so far, in any order. Ties are
    broken by the lower id. Without a finite largest logit (an engine gave NaN or infinity) nothing can come: n is 0.
    """
    logits = penalized(logits, params.repetition_penalty, history)
    best = int(logits.argmax())
    peak = float(logits[best])
    if not math.isfinite(peak):
        return np.empty(0, np.int64), np.empty(0, np.float64)
    if params.greedy:
        return np.array([best]), np.ones(1)
    if 0 < params.top_k < logits.shape[0]:
        ids = top_ids(logits, params.top_k)
        weights = _weights(logits[ids], peak, params.temperature)
        keep = _nucleus(weights, float(weights.sum()), params.top_p)
    elif params.top_p < 1:
        ids, weights, keep = _nucleus_of_all(logits, peak, params)
    else:
        ids = np.arange(logits.shape[0])
        weights = _weights(logits, peak, params.temperature)
        keep = logits.shape[0]
    ids, weights = ids[:keep], weights[:keep]
    if params.min_p > 0:
        likely = weights >= params.min_p  # the best token's weight is 1
        ids, weights = ids[likely], weights[likely]
    return ids, weights / weights.sum()


def processed_distribution(logits: Float32, params: SamplingParams, history: Int64) -> Float64:
    """The same as a dense vector f64 [vocab]; all zero where nothing can come. Speculative sampling compares these."""
    ids, probabilities = candidates(logits, params, history)
    dense = np.zeros(logits.shape[0])
    dense[ids] = probabilities
    return dense


def penalized(logits: Float32, penalty: float, history: Int64) -> Float32:
    """Logits after the repetition penalty (CTRL, arXiv:1909.05858, with the sign rule of Hugging Face Transformers)."""
    if penalty == 1.0:
        return logits
    changed = logits.copy()
    seen = changed[history]  # an id that is repeated is read here before any is written: it is penalised once
    changed[history] = np.where(seen > 0, seen / np.float32(penalty), seen * np.float32(penalty))
    return changed


def _weights(logits: Float32, peak: float, temperature: float) -> Float64:
    # exp of the scaled distance to the best, so at most 1: f32 is exact enough, sums over a vocabulary are taken in f64
    with np.errstate(over="ignore"):  # a tiny temperature makes the distance infinite and the weight 0, as it should
        weights = (logits - np.float32(peak)) / np.float32(max(temperature, _SMALLEST_DIVISOR))
    return np.exp(weights, out=weights).astype(np.float64)


def _nucleus(weights: Float64, total: float, top_p: float) -> int:
    """How many of the descending `weights` it takes to hold `top_p` of `total`."""
    if top_p >= 1:
        return weights.shape[0]
    # A token is kept if those before it do not hold enough yet; the first always is.
    return 1 + int(np.searchsorted(np.cumsum(weights[:-1]), top_p * total, side="left"))


def _nucleus_of_all(logits: Float32, peak: float, params: SamplingParams) -> tuple[Int64, Float64, int]:
    """Top-p over the whole vocabulary, sorting only as many tokens as are needed."""
    total, count = float(_weights(logits, peak, params.temperature).sum()), _NUCLEUS_GUESS
    while True:
        ids = top_ids(logits, count)
        weights = _weights(logits[ids], peak, params.temperature)
        keep = _nucleus(weights, total, params.top_p)
        if keep < ids.shape[0] or ids.shape[0] == logits.shape[0]:
            return ids, weights, keep
        count *= 16


def _tuple(name: str, value: object) -> tuple[Any, ...]:
    if isinstance(value, (list, tuple)):
        return tuple(value)
    raise UsageError(f"{name} is {value!r}, but a list or tuple was expected.")


def _integer(name: str, value: object, least: int) -> None:
    if type(value) is not int or value < least:  # type(): True is an int for isinstance
        raise UsageError(f"{name} is {value!r}, but a whole number of at least {least} was expected.")


def _number(name: str, value: Any, fits: Callable[[float], bool], expected: str) -> None:
    if type(value) not in (int, float) or not math.isfinite(value) or not fits(value):
        raise UsageError(f"{name} is {value!r}, but a number {expected} was expected.")
