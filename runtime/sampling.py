"""What a request asks for: the rules by which its next token is chosen, where it ends, what is told beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from angelforge.errors import UsageError
from angelforge.runtime.bias import Bias

MOST_LOGPROBS = 20  # as OpenAI's API has it


@dataclass(frozen=True)
class SamplingParams:
    """What a request asks for. The default is greedy decoding of up to 256 tokens.

    The rules apply in this order, each to what the one before left: logit bias, repetition penalty, frequency and
    presence penalty, what a grammar allows, temperature, top-k, top-p, min-p. Raises UsageError naming the parameter if
    a value makes no sense.
    """

    max_tokens: int = 256  # ends the output at so many tokens, finish reason "length"; 0 only with prompt_logprobs
    temperature: float = 0.0  # logits are divided by it; 0 is greedy: the rules after the penalty do not matter
    top_k: int = 0  # keep the k most probable tokens, ties with the last included; 0 keeps all
    top_p: float = 1.0  # keep the fewest most probable tokens that hold this probability; 1 keeps all
    min_p: float = 0.0  # keep tokens at least this fraction as probable as the best; 0 keeps all
    repetition_penalty: float = (
        1.0  # positive logits of tokens seen in prompt or output are divided by it, others times it
    )
    presence_penalty: float = 0.0  # taken from the logits of tokens that are in the output
    frequency_penalty: float = 0.0  # taken from the logits of tokens in the output, as often as they are in it
    logit_bias: Mapping[int, float] = field(default_factory=Bias)  # id → what is added to its logit, kept as a `Bias`
    seed: int | None = None  # equal seeds give equal outputs for equal prompts, whatever else runs; None: a fresh one
    stop: tuple[str, ...] = ()  # the output ends before the first of these strings
    stop_token_ids: tuple[int, ...] = ()  # end the output beside the model's own end tokens
    ignore_eos: bool = False  # do not end at the model's own end tokens
    logprobs: int | None = (
        None  # logprobs of the output, with so many of the likeliest at each place; 0: the token's own
    )
    prompt_logprobs: int | None = None  # the same for the prompt's tokens

    def __post_init__(self) -> None:
        # A frozen object's own fields: a list or one string is what people write, a tuple is what is kept.
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else _tuple("stop", self.stop))
        object.__setattr__(self, "stop_token_ids", _tuple("stop_token_ids", self.stop_token_ids))
        object.__setattr__(self, "logit_bias", Bias(self.logit_bias))
        _integer("max_tokens", self.max_tokens, 1 if self.prompt_logprobs is None else 0)
        _integer("top_k", self.top_k, 0)
        if self.seed is not None:
            _integer("seed", self.seed, 0)
        _number("temperature", self.temperature, lambda value: value >= 0, "0 or more")
        _number("top_p", self.top_p, lambda value: 0 < value <= 1, "above 0 and at most 1")
        _number("min_p", self.min_p, lambda value: 0 <= value <= 1, "from 0 to 1")
        _number("repetition_penalty", self.repetition_penalty, lambda value: 0.01 <= value <= 100, "from 0.01 to 100")
        for name in ("presence_penalty", "frequency_penalty"):
            _number(name, getattr(self, name), lambda value: -2 <= value <= 2, "from -2 to 2")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 0, MOST_LOGPROBS)
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise UsageError(
                    f"stop holds {text!r}, but every stop string must be a text of at least one character."
                )
            if any("\ud800" <= character <= "\udfff" for character in text):  # half a character
                raise UsageError(f"stop holds {text!r}, which is not valid Unicode.")
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, 0)

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always taken."""
        return self.temperature == 0.0

    @property
    def penalizes(self) -> bool:
        """Whether earlier tokens change what comes."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def bias(self) -> Bias:
        """`logit_bias` with its arrays."""
        assert isinstance(self.logit_bias, Bias)
        return self.logit_bias


def _tuple(name: str, value: object) -> tuple[Any, ...]:
    if isinstance(value, (list, tuple)):
        return tuple(value)
    raise UsageError(f"{name} is {value!r}, but a list or tuple was expected.")


def _integer(name: str, value: object, least: int, most: int | None = None) -> None:
    # type(): True is an int for isinstance
    if type(value) is not int or value < least or (most is not None and value > most):
        expected = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise UsageError(f"{name} is {value!r}, but a whole number {expected} was expected.")


def _number(name: str, value: Any, fits: Callable[[float], bool], expected: str) -> None:
    if type(value) not in (int, float) or not math.isfinite(value) or not fits(value):
        raise UsageError(f"{name} is {value!r}, but a number {expected} was expected.")
