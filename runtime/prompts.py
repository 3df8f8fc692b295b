"""Prompts as token ids, checked before anything runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from angelforge.errors import UsageError
from angelforge.runtime.batch import Int64
from angelforge.runtime.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Int64  # a text, or token ids [n]


def encode_prompt(prompt: Prompt, tokenizer: Tokenizer | None, vocab_size: int, max_context: int) -> Int64:
    """The token ids of a prompt, int64 [n]; raises UsageError saying what is wrong with it."""
    if not isinstance(prompt, str):
        ids = _ids(prompt)
    elif tokenizer is None:
        raise UsageError("The prompt is a text, but the bundle has no tokenizer.json. Give token ids instead.")
    else:
        ids = np.array(tokenizer.encode(prompt), np.int64)
    if ids.shape[0] == 0:
        raise UsageError("The prompt is empty, but at least one token is needed.")
    outside = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    if outside.shape[0]:
        place = int(outside[0])
        raise UsageError(
            f"Token {place} of the prompt has id {ids[place]}, but the model's ids are 0 to {vocab_size - 1}."
        )
    if ids.shape[0] > max_context:
        raise UsageError(
            f"The prompt has {ids.shape[0]} tokens, but the context is {max_context}. Shorten it, or export with a "
            "larger --max-context if the model allows it."
        )
    return ids


def _ids(prompt: Sequence[int] | Int64) -> Int64:
    if isinstance(prompt, np.ndarray):
        fits = prompt.ndim == 1 and np.issubdtype(prompt.dtype, np.integer)
    else:
        fits = isinstance(prompt, (list, tuple)) and all(map(_is_integer, prompt))
    if not fits:
        raise UsageError(f"A prompt is a {type(prompt).__name__}, but a text or a list of token ids was expected.")
    try:
        return np.array(prompt, np.int64)
    except OverflowError:
        raise UsageError("The prompt has a token id of more than 64 bits, which no vocabulary has.") from None


def _is_integer(value: object) -> bool:
    return type(value) is int or isinstance(value, np.integer)  # type(): True is an int for isinstance
