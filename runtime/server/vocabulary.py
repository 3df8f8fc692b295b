"""Tokens as texts and bytes, and grammars over them."""

from __future__ import annotations

from functools import lru_cache

import llguidance

from angelforge.runtime.llm import LLM

_CACHED = 65536  # texts of tokens that are kept: more than answers repeat


class Vocabulary:
    """The tokens of a model as API answers show them. Without a tokenizer every token is its number in brackets."""

    def __init__(self, llm: LLM) -> None:
        self.size = llm.config.vocab_size
        self.guide: llguidance.LLTokenizer | None = None  # None: no tokenizer, or one that cannot be constrained
        self.problem = "the bundle has no tokenizer"
        self.special_ids = frozenset[int]() if llm.tokenizer is None else llm.tokenizer.special_ids
        self._tokenizer = llm.tokenizer
        if llm.tokenizer is not None:
            known = llm.tokenizer.to_json()
            ends = [token for token in llm.config.eos_token_ids if token < self.size]
            try:
                # Models round their vocabulary up: ids that the tokenizer does not know are never allowed by a grammar.
                self.guide = llguidance.LLTokenizer(known, n_vocab=self.size, eos_token=ends or None)
            except ValueError as error:
                self.problem = f"llguidance cannot read its tokenizer ({error})"
        self.text = lru_cache(_CACHED)(self._text)

    def bytes(self, token: int) -> bytes:
        """What a token stands for; single bytes of a character where a token is no whole one."""
        if self.guide is None or token >= self.size:
            return f"[{token}]".encode()
        return bytes(self.guide.decode_bytes([token]))

    def is_special(self, text: str) -> bool:
        """Whether a special token is written so."""
        return self._tokenizer is not None and self._tokenizer.special_id(text) is not None

    def _text(self, token: int) -> str:
        """The token as text; as OpenAI has it, `bytes:\\xe2\\x82` where it is half a character."""
        raw = self.bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
