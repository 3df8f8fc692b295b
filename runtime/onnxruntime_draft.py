"""Runs a bundle's draft on ONNX Runtime, beside the target's engine."""

from typing import Any

from angelforge.bundle import Bundle
from angelforge.engines.cpu import open_draft_engine
from angelforge.errors import AngelForgeError
from angelforge.runtime.batch import Batch, Float32, Int64
from angelforge.runtime.draft_vocabulary import read_vocabulary
from angelforge.runtime.onnxruntime_engine import OnnxRuntimeEngine
from angelforge.runtime.onnxruntime_session import PooledSession

_DEEPEST = 16  # nothing on a CPU limits the depth; deeper chains are never right to their end


class OnnxRuntimeDraft:
    """The draft's session and its own pool of one layer; implements `DraftEngine`."""

    def __init__(self, bundle: Bundle, target: OnnxRuntimeEngine, threads: int = 0, ranks: int = 1) -> None:
        """Beside `target`, of `ranks` ranks the first one's, with as many pages.

        Raises AngelForgeError where the two do not fit or cannot be loaded.
        """
        config = bundle.manifest.draft
        if config is None:
            raise AngelForgeError(f"The bundle {bundle.folder} has no draft. Export it with --draft DIR.")
        self.config = config
        self.page_size, self.num_pages, self.max_depth = target.page_size, target.num_pages, _DEEPEST
        self.vocabulary = read_vocabulary(bundle, config)
        self._target = target
        shape = (target.num_pages, 2, config.num_key_value_heads, target.page_size, config.head_dim)
        outputs = ("hidden_out", "target_ids", "logits")
        engine = open_draft_engine(bundle, ranks, target.target)
        self._session = PooledSession(bundle, engine, outputs, 1, shape, threads, target.device, ("hidden_out",))
        self._hidden: Any = None
        self._logits: Any = None

    @property
    def pool(self) -> Float32:
        """The KV pool f32 [num_pages, 2, kv_heads, page_size, head_dim]: live, of a GPU a copy."""
        return self._session.pools[0]

    def follow(self, batch: Batch, rows: Int64) -> Int64:
        """One step on the states that the target's last call computed in its rows `rows` int64 [T]."""
        hidden = self._target.draft_hidden
        if rows.shape[0] != hidden.shape()[0] or (rows[1:] <= rows[:-1]).any():
            hidden = self._session.place(hidden.numpy()[rows])
        return self._run(batch, hidden)

    def extend(self, batch: Batch) -> Int64:
        """One step on the first T states that this draft's last call handed on."""
        tokens, hidden = batch.input_ids.shape[0], self._hidden
        if hidden.shape()[0] != tokens:
            hidden = self._session.place(hidden.numpy()[:tokens])
        return self._run(batch, hidden)

    def logits(self) -> Float32:
        """Logits f32 [R, draft vocabulary] of the last call."""
        values: Float32 = self._logits.numpy()
        return values

    def close(self) -> None:
        """Gives session and pool back."""
        self._hidden = self._logits = None
        self._session.close()

    def _run(self, batch: Batch, hidden: Any) -> Int64:
        self._hidden, ids, self._logits = self._session.run(batch, {"hidden": hidden})
        found: Int64 = ids.numpy()
        return found
