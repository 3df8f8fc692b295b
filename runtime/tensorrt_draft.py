"""Runs a bundle's draft on TensorRT, beside the target's engine; states never leave the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from angelforge.bundle import Bundle
from angelforge.dtypes import DType
from angelforge.engines.manifest import DRAFT_FILE, EngineManifest, engine_folder
from angelforge.engines.profiles import Profile
from angelforge.engines.tensorrt_loading import TensorrtEngine as OpenedEngine
from angelforge.errors import AngelForgeError
from angelforge.runtime.batch import Batch, Int64
from angelforge.runtime.device import to_host
from angelforge.runtime.device_weights import DeviceWeights, load_weights
from angelforge.runtime.draft_vocabulary import read_vocabulary
from angelforge.runtime.tensorrt_bindings import Bindings
from angelforge.runtime.tensorrt_buckets import Buckets
from angelforge.runtime.tensorrt_buffers import Buffer, allocate_pools, buffer_bytes, largest_of, pool_view
from angelforge.runtime.tensorrt_engine import TensorRTEngine
from angelforge.runtime.tensorrt_inputs import ROWS, InputArena, InputLayout
from angelforge.runtime.tensorrt_memory import DeviceNeeds
from angelforge.runtime.tensorrt_runner import Fixed, Runner
from angelforge.runtime.tensorrt_session import TensorrtSession
from angelforge.runtime.weight_layout import place_weights

_OUTPUTS = ("hidden_out", "logits", "target_ids")
_PREFIX = "draft."  # of the names of its own weights


class TensorRTDraft:
    """The draft's engine with its own pool of one layer; implements `DraftEngine`."""

    def __init__(self, bundle: Bundle, opened: OpenedEngine, target: TensorRTEngine) -> None:
        """Beside `target`, with as many pages; raises AngelForgeError as the target's engine does."""
        config = bundle.manifest.draft
        if config is None:
            raise AngelForgeError(f"The bundle {bundle.folder} has no draft. Export it with --draft DIR.")
        self.config = config
        self.page_size, self.num_pages = target.page_size, target.num_pages
        self.max_depth = int(opened.manifest.options.get("draft_depth") or 0)
        self.vocabulary = read_vocabulary(bundle, config)
        self._target, device, plan = target, target.device, target.states_plan
        session = TensorrtSession(target.session_library, opened.plan)
        bindings = session.bindings(("hidden",), _OUTPUTS)
        largest = largest_of(opened.profiles)
        if (largest.tokens, largest.rows) != (target.largest.tokens, target.largest.rows):
            raise AngelForgeError("The engines of draft and target were built for different sizes. Build both again.")
        self._weights, shared = _load(bundle, bindings, target)
        activations = target.activations
        if session.activation_bytes > activations.shape[0]:
            activations = device.allocate(session.activation_bytes)
        self._pool, self._pool_tensors = allocate_pools(device, bindings.pools, self.num_pages), bindings.pools
        width, dtype = plan.tensor.shape[-1], plan.tensor.dtype
        self._hidden = Buffer.of(device, dtype, (largest.tokens, width))
        logits, ids = bindings.outputs["logits"], bindings.outputs["target_ids"]
        self._logits = Buffer.of(device, logits.dtype, (largest.rows, logits.shape[-1]))
        self._ids = Buffer.of(device, ids.dtype, (largest.rows,))
        assert target.states is not None  # as `states_plan` has said
        self._states = target.states.tensor  # [states, hidden]
        self._own = plan.tokens  # where this draft's rows begin in them
        self._rows = 0  # of the last call
        fixed = Fixed(
            addresses=shared
            | {name: self._weights.address(name) for name in self._weights.layout.placements}
            | bindings.pool_addresses(int(self._pool.data_ptr()), self.num_pages)
            | {
                "hidden": self._hidden.address,
                "hidden_out": target.states.address + self._own * buffer_bytes(dtype, (width,)),
                "logits": self._logits.address,
                "target_ids": self._ids.address,
            },
            shapes={pool.name: (self.num_pages, *pool.shape[1:]) for pool in bindings.pools} | {"hidden": (-1, width)},
            activations=activations,
            page_size=self.page_size,
            largest=largest,
        )
        buckets = Buckets(opened.profiles, target.captured_batch, self.max_depth)
        self._runner = Runner(session, device, target.stream, buckets, fixed, self._gather)
        if target.cuda_graphs:
            self._runner.capture()

    @property
    def pool(self) -> Any:
        """The KV pool, live, on the device: torch.Tensor [num_pages, 2, kv_heads, page_size, head_dim]."""
        return pool_view(self._pool, self._pool_tensors, 0, self.num_pages)

    def follow(self, batch: Batch, rows: Int64) -> Int64:
        """One step on the states that the target's last call computed in its rows `rows` int64 [T]."""
        return self._run(batch, rows)

    def extend(self, batch: Batch) -> Int64:
        """One step on the first T states that this draft's last call handed on."""
        return self._run(batch, np.arange(self._own, self._own + batch.input_ids.shape[0]))

    def logits(self) -> Any:
        """Logits f32 [R, draft vocabulary] of the last call, a torch.Tensor on the device; valid until the next."""
        return self._logits.tensor[: self._rows]

    def close(self) -> None:
        """Gives engine, weights and pool back."""
        self._runner.close()
        del self._weights, self._pool, self._hidden, self._logits, self._ids, self._states

    def _run(self, batch: Batch, rows: Int64) -> Int64:
        self._rows = batch.logit_indices.shape[0]
        self._runner.run(batch, rows)
        found: Int64 = to_host(self._ids.tensor[: self._rows])
        return found

    def _gather(self, arena: InputArena, layout: InputLayout) -> None:
        """Picks the states that the step's tokens go on from; `hidden_out` may overwrite them afterwards."""
        rows = arena.on_device(layout, ROWS)
        torch.index_select(self._states, 0, rows, out=self._hidden.tensor[: layout.size.tokens])


def draft_needs(bundle: Bundle, target: str, profiles: Sequence[Profile], ranks: int = 1) -> DeviceNeeds:
    """What the draft of a bundle will take of the device, before it is loaded.

    Raises AngelForgeError where its engine has no manifest.
    """
    config, manifest = bundle.manifest.draft, bundle.manifest
    assert config is not None
    built = EngineManifest.load(engine_folder(bundle, target, ranks), DRAFT_FILE)
    activation, largest = manifest.precision.activation, largest_of(profiles)
    states = buffer_bytes(activation, (largest.tokens, manifest.model.hidden_size))
    logits = buffer_bytes(DType.F32, (largest.rows, config.draft_vocab_size))
    own = sum(info.nbytes for name, info in bundle.tensors.items() if name.startswith(_PREFIX))
    if ranks > 1:  # it needs the whole embedding, of which each rank has a part
        own += bundle.tensors["model.word_embeddings.weight"].nbytes
    return DeviceNeeds(
        weights=own,
        activations=max(built.activation_bytes, default=0),
        steps=states + logits + InputLayout(largest).nbytes,
        page=2 * config.num_key_value_heads * manifest.page_size * config.head_dim * activation.itemsize,
    )


def _load(bundle: Bundle, bindings: Bindings, target: TensorRTEngine) -> tuple[DeviceWeights, dict[str, int]]:
    """The draft's own weights, and the addresses of those that the target holds already (the embedding)."""
    held = target.weights.layout.placements
    shared, own = {}, dict(bindings.weights)
    for name, need in bindings.weights.items():
        info, other = bundle.tensors.get(name), held.get(name)
        if other is not None and other.info == info and not other.slices and other.info.shape == need.shape:
            shared[name] = target.weights.address(name)
            del own[name]
    return load_weights(place_weights(bundle.tensors, own, {}), target.device), shared
