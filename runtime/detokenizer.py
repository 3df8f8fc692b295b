"""Text of a growing list of token ids, piece by piece, never with half a character."""

from __future__ import annotations

from angelforge.runtime.stops import StopFilter
from angelforge.runtime.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"  # what incomplete UTF-8 decodes to
_LONGEST_PARTIAL = 3  # bytes that a UTF-8 character can lack its last byte with: each can show as a replacement
_WINDOW = 32  # ids that are decoded together at most; half of them stay as context
_SHORT = 12  # ids that are decoded together where no character is cut: fewer cost less


class Detokenizer:
    """Decodes one token more at a time; the pieces together are the text of all ids.

    Only the last few ids are decoded at every step, so a token costs the same however long the text is. Text that ends
    with U+FFFD is held back for a while: the next token may complete the character.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decode, self._special_ids = tokenizer.decode, tokenizer.special_ids
        self._window: list[int] = []
        self._shown = 0  # characters of the window's text that were returned

    def push(self, token: int) -> str:
        """The text that is certain after `token`; empty for special tokens and incomplete characters."""
        if token in self._special_ids:
            return ""
        window = self._window
        window.append(token)
        text = self._decode(window)
        if not text.endswith(_REPLACEMENT):
            new, self._shown = text[self._shown :], max(self._shown, len(text))
            if len(window) >= _SHORT:
                self._shorten(text)
            return new
        if len(window) < _WINDOW:
            # Byte by byte, decoders differ in how much of what came before they also show as replacements: wait.
            return ""
        certain = len(text)
        while certain > 0 and len(text) - certain < _LONGEST_PARTIAL and text[certain - 1] == _REPLACEMENT:
            certain -= 1
        new = text[self._shown : certain]
        self._shown = max(self._shown, certain)
        self._cut(text)
        return new

    def _shorten(self, text: str) -> None:
        """Forgets half of a window, and a little more where that would cut a character, if all of its text is shown."""
        half = len(self._window) // 2
        for begin in range(half, half + 1 + _LONGEST_PARTIAL):
            shorter = self._decode(self._window[begin:])
            if shorter and text.endswith(shorter):
                del self._window[:begin]
                self._shown = len(shorter)
                return
        if len(self._window) >= _WINDOW:
            self._cut(text)

    def _cut(self, text: str) -> None:
        # A shorter window may begin inside a character or lose its leading space: count from its end.
        waiting = len(text) - self._shown
        del self._window[: -_WINDOW // 2]
        self._shown = max(0, len(self._decode(self._window)) - waiting)

    def finish(self) -> str:
        """What was held back: no more tokens come."""
        rest = self._decode(self._window)[self._shown :]
        self._window.clear()
        self._shown = 0
        return rest


class TextStream:
    """The text of an output as it may be shown: decoded and cut before a stop string."""

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...]) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._filter = StopFilter(stops)

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come; nothing is shown from there on."""
        return self._filter.stopped

    def push(self, token: int) -> str:
        """The text to show after `token`."""
        return self._filter.push(self._detokenizer.push(token))

    def finish(self) -> str:
        """The rest of the text: what was held back, unless a stop string is in it."""
        return self._filter.push(self._detokenizer.finish()) + self._filter.finish()
