"""Polygraphy runners of a bundle: the judge, built engines, the kernels inside the graph, and references.

A runner takes the inputs of one packed call and gives its logits and the keys and values that the call wrote. It keeps
its own KV pool from call to call, as an engine does, or takes the pools as inputs, as the ONNX file says (Polygraphy's
command line: `own_pool=False`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.datatype import DataType
from polygraphy.logger import G_LOGGER

from angelforge.bundle import Bundle
from angelforge.errors import AngelForgeError
from angelforge.runtime.batch import INPUTS, Batch
from angelforge.runtime.engines import Engine, load_engine
from angelforge.runtime.validate.cutting import Array, OrtPiece, Values, cut
from angelforge.runtime.validate.engine_graph import Piece
from angelforge.runtime.validate.kernel_graph import KernelGraph
from angelforge.runtime.validate.operations import Stage, judge_graph

Outputs = OrderedDict[str, Array]
Compute = Callable[[Array], Mapping[str, Array]]


class BundleRunner(BaseRunner, ABC):  # type: ignore[misc]
    """What all runners of a bundle share: inputs as the graph has them, pools kept or taken."""

    def __init__(self, bundle: Bundle, name: str, num_pages: int = 2, own_pool: bool = True) -> None:
        """`num_pages` is the size of the runner's own pool, page 0 included."""
        super().__init__(name=name)
        self.bundle, self.num_pages, self.own_pool = bundle, num_pages, own_pool

    def get_input_metadata_impl(self) -> TensorMetadata:
        """Names, types and shapes of the inputs; sizes that a call decides are None."""
        graph = ir.load(self.bundle.folder / self.bundle.manifest.graphs["target"]).graph
        metadata = TensorMetadata()
        for value in graph.inputs:
            if value.is_initializer() or (self.own_pool and value.name not in INPUTS):
                continue
            shape = [d if isinstance(d, int) else None for d in (value.shape or ())]
            metadata.add(value.name, DataType.from_dtype(self._input_type(value)), shape)
        return metadata

    def _input_type(self, value: ir.Value) -> Any:
        dtype = value.dtype
        assert dtype is not None
        return np.dtype(np.float32) if dtype == ir.DataType.BFLOAT16 else dtype.numpy()

    def activate(self) -> None:
        """As Polygraphy's, on whose command line an error is a sentence of its own kind."""
        with self._told():
            super().activate()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except AngelForgeError as error:
            if not self.own_pool:  # Polygraphy's command line, which shows tracebacks of all errors but its own
                G_LOGGER.critical(str(error))
            raise

    def infer_impl(self, feed_dict: Mapping[str, Array]) -> Outputs:
        """Outputs of one packed call."""
        begin = perf_counter()
        with self._told():
            outputs = self.call(feed_dict)
        self.inference_time = perf_counter() - begin
        return outputs

    @abstractmethod
    def call(self, feed: Mapping[str, Array]) -> Outputs:
        """What a runner does."""

    def _pool_shape(self) -> tuple[int, ...]:
        model = self.bundle.manifest.model
        return (self.num_pages, 2, model.num_key_value_heads, self.bundle.manifest.page_size, model.head_dim)


class StagedRunner(BundleRunner):
    """A graph that runs stage after stage."""

    def activate_impl(self) -> None:
        """Opens all stages; weights stay mapped from their files."""
        self._stages = self.open_stages()
        layers = range(self.bundle.manifest.model.num_hidden_layers)
        self._pools = {f"kv_cache.{i}": self.empty(self._pool_shape()) for i in layers} if self.own_pool else {}

    def deactivate_impl(self) -> None:
        """Closes them."""
        del self._stages, self._pools

    @abstractmethod
    def open_stages(self) -> list[tuple[Stage, Piece]]:
        """The stages with what computes them."""

    def empty(self, shape: tuple[int, ...]) -> Array:
        """A pool of zeros in the type that the stages take."""
        return np.zeros(shape, np.float32)

    def call(self, feed: Mapping[str, Array]) -> Outputs:
        """All stages, one after another; each frees what the one before has left."""
        values: dict[str, Array] = {**feed, **self._pools}
        outputs: Outputs = OrderedDict()
        for stage, piece in self._stages:
            values |= piece.run(values)
            if stage.pool_out is not None:
                number = str(stage.pool).rpartition(".")[2]
                if self.own_pool:
                    self._pools[f"kv_cache.{number}"] = values[stage.pool_out]
                    outputs[f"cache.{number}"] = written(values[stage.pool_out], feed)
                else:
                    outputs[stage.pool_out] = _plain(values[stage.pool_out])
        if "draft_hidden" in values:
            outputs["draft_hidden"] = _plain(values["draft_hidden"])[: int(feed["num_tokens"][0])]
        outputs["logits"] = values["logits"]
        outputs.move_to_end("logits", last=False)
        return outputs


class JudgeRunner(StagedRunner):
    """ONNX Runtime on the bundle's graph, widened to f32 where needed, with nothing optimised."""

    def __init__(self, bundle: Bundle, num_pages: int = 2, own_pool: bool = True, as_stored: bool = False) -> None:
        """With `as_stored` values are rounded to the bundle's types between operators."""
        super().__init__(bundle, "judge: ONNX Runtime on the graph", num_pages, own_pool)
        self.as_stored = as_stored

    def open_stages(self) -> list[tuple[Stage, Piece]]:
        """A session for each stage."""
        judge = judge_graph(self.bundle, self.as_stored)
        root = self.bundle.folder
        return [(stage, OrtPiece(cut(judge.model, stage.inputs, stage.outputs), root)) for stage in judge.stages]


class KernelRunner(StagedRunner):
    """The project's Triton kernels inside the graph, on a GPU or in the interpreter."""

    def __init__(self, bundle: Bundle, num_pages: int = 2, own_pool: bool = True) -> None:
        """Raises AngelForgeError for a bundle in f32."""
        super().__init__(bundle, "kernels: Triton inside the graph", num_pages, own_pool)
        self._graph = KernelGraph(bundle)

    def open_stages(self) -> list[tuple[Stage, Piece]]:
        """An evaluator for each stage, made when it is its turn: one layer's weights are in memory."""
        stages = judge_graph(self.bundle).stages
        return [(stage, _LazyPiece(self._graph, stage)) for stage in stages]

    def empty(self, shape: tuple[int, ...]) -> Array:
        """bf16, as the kernels take it."""
        return np.zeros(shape, ml_dtypes.bfloat16)

    def call(self, feed: Mapping[str, Array]) -> Outputs:
        """Pools that were given come as f32."""
        types = self._graph.input_types
        return super().call(
            {n: a.astype(ml_dtypes.bfloat16) if types[n] == ir.DataType.BFLOAT16 else a for n, a in feed.items()}
        )


@dataclass(frozen=True, eq=False)
class _LazyPiece:
    graph: KernelGraph
    stage: Stage

    def run(self, values: Values) -> dict[str, Array]:
        return self.graph.piece(self.stage.inputs, self.stage.outputs).run(values)


class EngineRunner(BundleRunner):
    """The engine that was built for a target, as `run` loads it."""

    def __init__(self, bundle: Bundle, target: str, num_pages: int = 2, own_pool: bool = True) -> None:
        """`target` as in `angelforge build`."""
        super().__init__(bundle, f"engine: {target}", num_pages, own_pool)
        self.target = target
        self._engine: Engine | None = None

    def activate_impl(self) -> None:
        """Loads the engine; its own pool comes with it."""
        if self.own_pool:
            self._engine = load_engine(self.bundle, self.target, num_pages=self.num_pages, max_batch=1)

    def deactivate_impl(self) -> None:
        """Frees it."""
        if self._engine is not None:
            self._engine.close()
        self._engine = None

    def call(self, feed: Mapping[str, Array]) -> Outputs:
        """One step of the engine, and what it wrote where it lays its pool open."""
        if not self.own_pool:
            return self._call_with_pools(feed)
        assert self._engine is not None
        outputs: Outputs = OrderedDict(logits=_host(self._engine.forward(Batch(**{n: feed[n] for n in INPUTS}))))
        for number, pool in enumerate(_pools(self._engine)):
            outputs[f"cache.{number}"] = written(pool, feed)
        if self.bundle.manifest.draft is not None and hasattr(self._engine, "draft_hidden"):
            states = self._engine.draft_hidden  # an OrtValue, or a tensor on a device
            rows = states.numpy() if hasattr(states, "numpy") and not hasattr(states, "cpu") else _host(states)
            outputs["draft_hidden"] = rows[: int(feed["num_tokens"][0])]
        return outputs

    def _call_with_pools(self, feed: Mapping[str, Array]) -> Outputs:
        engine = load_engine(self.bundle, self.target, num_pages=len(feed["kv_cache.0"]), max_batch=1)
        try:
            pools = _pools(engine)
            for number, pool in enumerate(pools):
                if isinstance(pool, np.ndarray) and not pool.flags.writeable:
                    raise AngelForgeError(
                        f"The engine {self.target} keeps its pool on a GPU where it cannot be set: compare with "
                        "angelforge validate, which starts with an empty pool."
                    )
                given = feed[f"kv_cache.{number}"]
                pool[...] = given if isinstance(pool, np.ndarray) else pool.new_tensor(given)
            outputs: Outputs = OrderedDict(logits=_host(engine.forward(Batch(**{n: feed[n] for n in INPUTS}))))
            outputs |= {f"kv_cache_out.{number}": _host(pool) for number, pool in enumerate(pools)}
        finally:
            engine.close()
        return outputs


class ReferenceRunner(BundleRunner):
    """Any function of whole sequences that gives logits, and keys and values of the layers if it has them.

    A packed call names a sequence by its first page; the runner remembers what came before of each. With pools as
    inputs every sequence must begin in the call.
    """

    def __init__(self, bundle: Bundle, compute: Compute, name: str, num_pages: int = 2, own_pool: bool = True) -> None:
        """`compute` maps int64 [n] to outputs by name, a row for each token: `logits` [n, vocab] and others."""
        super().__init__(bundle, name, num_pages, own_pool)
        self._compute = compute

    def activate_impl(self) -> None:
        """Nothing has been seen yet."""
        self._seen: dict[int, Array] = {}

    def deactivate_impl(self) -> None:
        """Forgets all sequences."""
        del self._seen

    def call(self, feed: Mapping[str, Array]) -> Outputs:
        """Logits of the rows that are asked for, everything else of all tokens; rows of padding have logits 0."""
        starts, table = feed["query_start"], feed["page_table"]
        parts: dict[str, list[Array]] = {}
        for sequence, (begin, end) in enumerate(pairwise(starts.tolist())):
            if begin == end:
                continue
            page, place = int(table[sequence, 0]), int(feed["positions"][begin])
            before = self._seen.get(page, np.empty(0, np.int64))[:place]
            ids = np.concatenate([before, feed["input_ids"][begin:end]])
            self._seen[page] = ids
            for name, values in self._compute(ids).items():
                parts.setdefault(name, []).append(np.asarray(values, np.float32)[place : place + end - begin])
        if not self.own_pool:  # whole pools are compared there, and it has none
            parts = {"logits": parts["logits"]}
        outputs: Outputs = OrderedDict((name, np.concatenate(rows)) for name, rows in parts.items())
        padding = np.zeros((len(feed["input_ids"]) - int(starts[-1]), outputs["logits"].shape[1]), np.float32)
        outputs["logits"] = np.concatenate([outputs["logits"], padding])[feed["logit_indices"]]
        return outputs


def written(pool: Any, feed: Mapping[str, Array]) -> Array:
    """f32 [tokens, 2, kv_heads, head_dim]: the keys and values that a call's tokens have in a pool.

    `pool` is an array, or a tensor on a device.
    """
    slots = feed["slots"][: int(feed["num_tokens"][0])]
    page_size = pool.shape[3]
    pages, offsets = (slots // page_size).tolist(), (slots % page_size).tolist()
    return _host(pool[pages, :, :, offsets])


def feed_dict(batch: Batch) -> OrderedDict[str, Array]:
    """A batch as Polygraphy hands it around."""
    return OrderedDict((name, getattr(batch, name)) for name in INPUTS)


def _pools(engine: Engine) -> list[Any]:
    """The pools of the layers, live, where an engine lays them open: arrays, or tensors on a device."""
    pools = getattr(engine, "pools", ())
    return list(pools.values() if isinstance(pools, Mapping) else pools)


def _host(values: Any) -> Array:
    """f32 in memory of their own: engines reuse theirs, or hold them on a device."""
    if isinstance(values, np.ndarray):
        return np.array(values, np.float32)
    return np.array(values.detach().float().cpu().numpy())


def _plain(array: Array) -> Array:
    return array.astype(np.float32) if array.dtype == ml_dtypes.bfloat16 else array
