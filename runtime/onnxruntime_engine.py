"""Runs a bundle's engine on ONNX Runtime: target `cpu`, or `cuda`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from angelforge.bundle import Bundle
from angelforge.config import ModelConfig
from angelforge.engines.cpu import TARGET, open_engine
from angelforge.errors import AngelForgeError
from angelforge.ranks import rank_config
from angelforge.runtime.batch import Batch, Float32
from angelforge.runtime.onnxruntime_device import CPU_DEVICE, OrtDevice
from angelforge.runtime.onnxruntime_session import PooledSession

if TYPE_CHECKING:
    from angelforge.runtime.group import Group
    from angelforge.runtime.onnxruntime_segments import SegmentedSession


class OnnxRuntimeEngine:
    """The target's session and its KV pool."""

    def __init__(
        self,
        bundle: Bundle,
        num_pages: int,
        threads: int = 0,
        group: Group | None = None,
        *,
        target: str = TARGET,
        device: OrtDevice = CPU_DEVICE,
    ) -> None:
        """The engine built for `target` on `device`; of one rank's part of the model with a `group`, else of all of it.

        Raises AngelForgeError where bundle and engine do not fit each other or cannot be loaded.
        """
        bundle.require_weights()
        self.config: ModelConfig = bundle.manifest.model
        self.page_size = bundle.manifest.page_size
        self.max_context = bundle.manifest.max_context
        self.num_pages = num_pages
        self.target, self.device = target, device
        outputs = ("logits",) if bundle.manifest.draft is None else ("draft_hidden", "logits")
        part = self.config if group is None else rank_config(self.config, bundle.manifest.precision, group.ranks)
        shape = (num_pages, 2, part.num_key_value_heads, self.page_size, self.config.head_dim)
        self._session: PooledSession | SegmentedSession
        if group is None:
            layers = self.config.num_hidden_layers
            engine = open_engine(bundle, target=target)
            self._session = PooledSession(bundle, engine, outputs, layers, shape, threads, device, ("draft_hidden",))
        else:
            from angelforge.runtime.onnxruntime_segments import SegmentedSession

            engine = open_engine(bundle, group.ranks)
            self._session = SegmentedSession(bundle, engine, outputs, shape, threads, group)
        self._draft_hidden: Any = None

    @property
    def pools(self) -> Sequence[Float32]:
        """The KV pool of each layer f32 [num_pages, 2, kv_heads, page_size, head_dim]: live, of a GPU a copy."""
        return self._session.pools

    @property
    def draft_hidden(self) -> Any:
        """What the last call made for the draft, an OrtValue f32 [T, hidden]; raises AngelForgeError without one."""
        if self._draft_hidden is None:
            raise AngelForgeError("The target has made no states for a draft: it was exported without one, or not run.")
        return self._draft_hidden

    def forward(self, batch: Batch) -> Float32:
        """Runs one packed call and returns logits f32 [R, vocab]; raises AngelForgeError as `PooledSession.run`."""
        *hidden, logits = self._session.run(batch)
        self._draft_hidden = hidden[0] if hidden else None
        values: Float32 = logits.numpy()
        return values

    def close(self) -> None:
        """Gives session and pool back."""
        self._draft_hidden = None
        self._session.close()
