"""Keys of pages: equal where a page and everything before it hold the same."""

from __future__ import annotations

from hashlib import blake2b

from angelforge.runtime.batch import Int64


class PageKeys:
    """The keys of a growing sequence's full pages; each is computed once.

    A page's key is a 256-bit digest of the key before and the page's tokens. A draft's entry at position i depends on
    token i + 1, so that with a draft a key covers the first token of the next page too: whoever finds such a page can
    use it in both pools.
    """

    def __init__(self, page_size: int, drafted: bool) -> None:
        self._page_size = page_size
        self._span = page_size + drafted
        self._keys: list[bytes] = []

    def of(self, tokens: Int64, count: int) -> list[bytes]:
        """The keys of the first `count` pages, or of those for which there are enough `tokens` [n]."""
        keys = self._keys
        while len(keys) < count:
            begin = len(keys) * self._page_size
            page = tokens[begin : begin + self._span]
            if page.shape[0] < self._span:
                break
            digest = blake2b(keys[-1] if keys else b"", digest_size=32)
            digest.update(page.tobytes())
            keys.append(digest.digest())
        return keys if len(keys) <= count else keys[:count]
