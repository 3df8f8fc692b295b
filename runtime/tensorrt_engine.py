"""Runs a bundle's engine on TensorRT 11 or TensorRT for RTX; logits stay on the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from angelforge.bundle import Bundle
from angelforge.config import ModelConfig
from angelforge.dtypes import DType
from angelforge.engines.tensorrt_loading import TensorrtEngine as OpenedEngine
from angelforge.errors import AngelForgeError, UsageError
from angelforge.plugins.tensorrt.library import Library
from angelforge.runtime.batch import Batch
from angelforge.runtime.device import Device, explained_gpu
from angelforge.runtime.device_weights import DeviceWeights, Progress, load_weights
from angelforge.runtime.tensorrt_buckets import Buckets
from angelforge.runtime.tensorrt_buffers import (
    Buffer,
    StatePlan,
    allocate_pools,
    largest_of,
    pool_view,
    step_bytes,
)
from angelforge.runtime.tensorrt_memory import DeviceNeeds, PoolWish, choose_pages
from angelforge.runtime.tensorrt_runner import Fixed, Runner
from angelforge.runtime.tensorrt_session import TensorrtSession
from angelforge.runtime.weight_layout import Slices, WeightLayout, place_weights
from angelforge.tensorfile import TensorInfo


@dataclass(frozen=True)
class WeightSource:
    """Where weights come from: the bundle's files, or a benchmark that makes them on the device."""

    tensors: Mapping[str, TensorInfo]  # names, types and shapes, each with an origin of its own
    make: Callable[[WeightLayout, Device], DeviceWeights]

    @classmethod
    def files(cls, bundle: Bundle, report: Progress | None) -> WeightSource:
        """The bundle's; raises AngelForgeError where it has none."""
        bundle.require_weights()
        return cls(bundle.tensors, lambda layout, device: load_weights(layout, device, report))


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is loaded."""

    num_pages: int | None = None  # of the pool; None: what is left, or what `kv_memory` bytes hold
    kv_memory: int | None = None
    max_batch: int = 32  # sequences that decode together; more than that are not captured
    drafted: DeviceNeeds | None = None  # what a draft will need beside it
    slices: Slices = field(default_factory=dict)  # what this rank takes of each weight
    on_context: Callable[[Any], None] | None = None  # is called with every IExecutionContext (a rank's communicator)
    agree: Callable[[int], int] | None = None  # on the pages of the pool, with the other ranks
    rank: int | None = None  # the graph's input of that name, where several ranks share the model
    cuda_graphs: bool = True  # decoding is captured
    report: Progress | None = None  # of the weights
    weights: WeightSource | None = None  # in place of the bundle's


class TensorRTEngine:
    """The target's engine with weights, KV pool and captured steps; implements `Engine`."""

    def __init__(
        self, bundle: Bundle, opened: OpenedEngine, library: Library, device: Device, options: EngineOptions
    ) -> None:
        """Raises AngelForgeError where weights, memory or TensorRT do not allow it; a short device is told at once."""
        source = options.weights or WeightSource.files(bundle, options.report)
        manifest, profiles = bundle.manifest, opened.profiles
        self.config: ModelConfig = manifest.model
        self.page_size, self.max_context = manifest.page_size, manifest.max_context
        self.max_tokens = profiles[-1].tokens.most  # of one step, as the next two
        self.max_batch, self.max_rows = profiles[-1].batch.most, profiles[-1].logit_rows.most
        if options.max_batch > self.max_batch:
            raise UsageError(
                f"{options.max_batch} sequences are to run at once, but the engine was built for {self.max_batch}: "
                "lower --max-batch, or build it with a larger one."
            )
        self.captured_batch, self.session_library = options.max_batch, library
        self.device, self.stream, self.logits_device = device, device.stream(), device.torch
        session = TensorrtSession(library, opened.plan, options.on_context)
        more = () if options.rank is None else ("rank",)
        bindings = session.bindings(more, ("logits",) if manifest.draft is None else ("draft_hidden", "logits"))
        layout = place_weights(source.tensors, bindings.weights, options.slices)
        largest = self.largest = largest_of(profiles)
        states = StatePlan.of(bindings, largest)
        self._states_plan = states
        drafted = options.drafted or DeviceNeeds(0, 0, 0, 0)
        activations = max(session.activation_bytes, drafted.activations)  # target and draft take turns
        steps = step_bytes(bindings, largest, states) + drafted.steps
        needs = DeviceNeeds(layout.nbytes + drafted.weights, activations, steps, bindings.page_bytes + drafted.page)
        useful = options.max_batch * -(-self.max_context // self.page_size) + 1
        wish = PoolWish(options.num_pages, options.kv_memory, useful, profiles[-1].pages.most)
        pages = choose_pages(needs, device.free_bytes(), wish)
        self.num_pages = pages if options.agree is None else options.agree(pages)
        self.weights = source.make(layout, device)
        self.activations = device.allocate(activations)
        self._pools, self._pool_tensors = allocate_pools(device, bindings.pools, self.num_pages), bindings.pools
        logits = bindings.outputs["logits"]
        self._logits = Buffer.of(device, logits.dtype, (largest.rows, logits.shape[-1]))
        self.states = None if states is None else Buffer.of(device, states.tensor.dtype, states.shape)
        outputs = {"logits": self._logits.address}
        if self.states is not None:
            outputs["draft_hidden"] = self.states.address
        self._rank = Buffer.of(device, DType.I64, (1,))
        self._rank.tensor.fill_(options.rank or 0)
        outputs |= dict.fromkeys(more, self._rank.address)
        fixed = Fixed(
            addresses={name: self.weights.address(name) for name in bindings.weights}
            | bindings.pool_addresses(int(self._pools.data_ptr()), self.num_pages)
            | outputs,
            shapes={pool.name: (self.num_pages, *pool.shape[1:]) for pool in bindings.pools},
            activations=self.activations,
            page_size=self.page_size,
            largest=largest,
        )
        depth = 0 if options.drafted is None else int(opened.manifest.options.get("draft_depth") or 0)
        self._runner = Runner(session, device, self.stream, Buckets(profiles, options.max_batch, depth), fixed)
        self.cuda_graphs = options.cuda_graphs
        if self.cuda_graphs:
            self._runner.capture()

    @property
    def states_plan(self) -> StatePlan:
        """How `states` is divided; raises AngelForgeError where the engine makes none for a draft."""
        if self._states_plan is None:
            raise AngelForgeError("The target's engine makes no states for a draft: it was exported without one.")
        return self._states_plan

    @property
    def pools(self) -> Mapping[str, Any]:
        """The KV pool of each layer, live: torch.Tensor [num_pages, 2, kv_heads, page_size, head_dim] on the device."""
        return {
            pool.name: pool_view(self._pools, self._pool_tensors, layer, self.num_pages)
            for layer, pool in enumerate(self._pool_tensors)
        }

    def forward(self, batch: Batch) -> Any:
        """Puts one packed call on the device; logits f32 [R, vocab] are a torch.Tensor there, valid until the next.

        Nothing is waited for: what torch's current stream gets after this sees the result. More rows than the engine
        was built for are computed in several runs, which write the same keys and values again. Raises AngelForgeError
        for a step larger than the engine was built for, one that TensorRT refuses, or a device that fails.
        """
        rows, most = batch.logit_indices, self.max_rows
        if rows.shape[0] <= most:
            self._runner.run(batch)
            return self._logits.tensor[: rows.shape[0]]
        found = Buffer.of(self.device, DType.F32, (rows.shape[0], self._logits.tensor.shape[1])).tensor
        for begin in range(0, rows.shape[0], most):
            part = rows[begin : begin + most]
            self._runner.run(dataclasses.replace(batch, logit_indices=part))
            with explained_gpu():
                found[begin : begin + part.shape[0]] = self._logits.tensor[: part.shape[0]]
        return found

    def close(self) -> None:
        """Gives engine, weights and pool back; TensorRT's objects before the memory that they use."""
        self._runner.close()
        del self.weights, self.activations, self._pools, self._logits, self._rank, self.states
