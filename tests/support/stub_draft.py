"""A draft for `PagedEngine` that honours the contract of a draft engine and sees every breach of it.

An entry of its pool holds what the real one depends on: the token of the position (as its state) and the token after.
Before it guesses it reads a sequence back through the page table and compares neighbours, so that a stale, misplaced
or missing entry is found.
"""

import numpy as np

from angelforge.errors import AngelForgeError


class StubDraft:
    """Guesses by a function of the whole sequence so far: ids [n] → logits over the target's vocabulary."""

    def __init__(self, engine, guess, vocabulary=None, max_depth=16, where=lambda logits: logits):
        """`where` puts the logits on a device."""
        self.engine, self.guess, self.where = engine, guess, where
        self.page_size, self.num_pages, self.max_depth = engine.page_size, engine.num_pages, max_depth
        self.vocabulary = np.arange(engine.config.vocab_size) if vocabulary is None else np.array(vocabulary)
        self.pool = np.full((engine.num_pages, engine.page_size, 2), -1)
        self.calls = []  # (tokens, rows of logits) of every call
        self.fail_with = None
        self.closed = False

    def follow(self, batch, rows):
        target = self.engine.last_batch
        assert (target.positions[rows] == batch.positions).all()
        assert (rows < target.num_tokens[0]).all()
        return self._run(batch, target.input_ids[rows])

    def extend(self, batch):
        return self._run(batch, self.handed_on[: len(batch.input_ids)])

    def logits(self):
        return self.where(self.last_logits)

    def close(self):
        self.closed = True

    def _run(self, batch, states):
        engine = self.engine
        batch.check(engine.config.vocab_size, self.page_size, self.num_pages, engine.max_context)
        self.calls.append((len(batch.input_ids), len(batch.logit_indices)))
        if self.fail_with is not None:
            error, self.fail_with = self.fail_with, None
            raise AngelForgeError(error)
        pages, offsets = np.divmod(batch.slots, self.page_size)
        self.pool[pages, offsets] = np.stack([states, batch.input_ids], axis=1)
        owner = np.searchsorted(batch.query_start, batch.logit_indices, side="right") - 1
        rows = [self._read(batch, *pair) for pair in zip(batch.logit_indices, owner, strict=True)]
        logits = [self.guess(ids)[self.vocabulary] for ids in rows]
        self.last_logits = np.array(logits, np.float32).reshape(len(rows), len(self.vocabulary))
        self.handed_on = batch.input_ids[batch.logit_indices]
        return self.vocabulary[self.last_logits.argmax(axis=1)] if rows else np.empty(0, np.int64)

    def _read(self, batch, row, owner):
        """All tokens of a row's sequence up to and with the one after it."""
        places = np.arange(batch.positions[row] + 1)
        entries = self.pool[batch.page_table[owner, places // self.page_size], places % self.page_size]
        assert (entries >= 0).all(), "an entry was never written"
        assert (entries[1:, 0] == entries[:-1, 1]).all(), "an entry is not of this sequence"
        return np.append(entries[:, 0], entries[-1, 1])


def perfect(engine):
    """Knows what the target will say."""
    return engine.dense_logits


def wrong(engine):
    """Always expects the token that the target likes least."""
    return lambda ids: -engine.dense_logits(ids)


def noisy(engine, seed=0):
    """Right about half of the time: the target's logits and noise that depends on the sequence alone."""

    def guess(ids):
        noise = np.random.default_rng([seed, *ids.tolist()]).standard_normal(engine.config.vocab_size)
        return engine.dense_logits(ids) + 1.5 * noise

    return guess
