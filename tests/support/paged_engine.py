"""A tiny deterministic model in NumPy that honours the contract of a packed call: wrong pages or slots change it.

Every token is computed by itself in f64, so that its logits do not depend, not even in the last bit, on what else is in
the call. The pool begins as NaN: whatever reads a slot that was not written ends in an error.
"""

from types import SimpleNamespace

import numpy as np

from angelforge.errors import AngelForgeError

WIDTH = 8


class PagedEngine:
    """One attention layer over a paged pool; positions and every earlier token of the sequence change the logits."""

    def __init__(self, page_size=4, num_pages=64, max_context=64, vocab_size=37, eos=(), seed=0):
        rng = np.random.default_rng(seed)
        self.config = SimpleNamespace(vocab_size=vocab_size, eos_token_ids=eos)
        self.page_size, self.num_pages, self.max_context = page_size, num_pages, max_context
        self.embedding = rng.standard_normal((vocab_size, WIDTH))
        self.place = rng.standard_normal((max_context + 1, WIDTH))
        self.query, self.key, self.value = rng.standard_normal((3, WIDTH, WIDTH))
        self.head = rng.standard_normal((WIDTH, vocab_size)) * 2
        self.pool = np.full((num_pages, 2, page_size, WIDTH), np.nan)
        self.last_batch = None
        self.batches = []  # the sizes (tokens, sequences) of all calls
        self.fail_with = None  # an error that the next call raises
        self.closed = False

    def forward(self, batch):
        batch.check(self.config.vocab_size, self.page_size, self.num_pages, self.max_context)
        self.last_batch = batch
        self.batches.append((int(batch.num_tokens[0]), int((np.diff(batch.query_start) > 0).sum())))
        if self.fail_with is not None:
            error, self.fail_with = self.fail_with, None
            raise AngelForgeError(error)
        hidden = self.embedding[batch.input_ids] + self.place[batch.positions]
        for x, slot in zip(hidden, batch.slots, strict=True):
            page, offset = divmod(int(slot), self.page_size)
            self.pool[page, 0, offset], self.pool[page, 1, offset] = self.key @ x, self.value @ x
        owner = np.searchsorted(batch.query_start, np.arange(len(hidden)), side="right") - 1
        logits = np.zeros((len(batch.logit_indices), self.config.vocab_size), np.float32)
        for index, row in enumerate(batch.logit_indices):
            if row < batch.num_tokens[0]:
                earlier = np.arange(batch.positions[row] + 1)
                pages = batch.page_table[owner[row], earlier // self.page_size]
                keys, values = self.pool[pages, :, earlier % self.page_size].swapaxes(0, 1)
                logits[index] = self._logits(hidden[row], keys, values)
        return logits

    def _logits(self, x, keys, values):
        scores = keys @ (self.query @ x) / 3
        weights = np.exp(scores - scores.max())
        return ((x + weights @ values / weights.sum()) @ self.head).astype(np.float32)

    def dense_logits(self, ids):
        """The same logits of the last token, without pages and packing."""
        hidden = self.embedding[ids] + self.place[: len(ids)]
        keys, values = np.stack([self.key @ x for x in hidden]), np.stack([self.value @ x for x in hidden])
        return self._logits(hidden[-1], keys, values)

    def close(self):
        self.closed = True
