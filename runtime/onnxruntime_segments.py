"""One rank's part of a model on ONNX Runtime: the segments of its graph in turn, summed over the ranks in between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime

from angelforge.bundle import Bundle
from angelforge.dtypes import DType
from angelforge.engines.onnxruntime_graph import ONNXRUNTIME_ERRORS
from angelforge.engines.segments import split
from angelforge.errors import AngelForgeError
from angelforge.runtime.batch import INPUTS, Batch, Float32
from angelforge.runtime.group import Group
from angelforge.runtime.onnxruntime_session import load_session
from angelforge.runtime.rank_weights import read_slice
from angelforge.runtime.sharding import slices

_FP8 = DType.F8_E4M3


class SegmentedSession:
    """A loaded row of graphs and its pools; runs what `PooledSession` runs, on every rank at once.

    The pool of each layer is f32 [num_pages, 2, the rank's kv_heads, page_size, head_dim], updated in place.
    """

    def __init__(
        self,
        bundle: Bundle,
        engine: bytes,
        outputs: Sequence[str],
        pool_shape: tuple[int, ...],
        threads: int,
        group: Group,
    ) -> None:
        """Raises AngelForgeError where a graph cannot be loaded, or the weights do not fit it."""
        self._group, self._outputs = group, tuple(outputs)
        layers = bundle.manifest.model.num_hidden_layers
        self.pools: list[Float32] = [np.zeros(pool_shape, np.float32) for _ in range(layers)]
        held = {f"kv_cache.{index}": _value(pool) for index, pool in enumerate(self.pools)}
        held["rank"] = _value(np.array([group.rank], np.int64))
        cut = slices(bundle.manifest.model, bundle.manifest.precision, group.rank, group.ranks)
        self._weights: list[Any] = []  # what the bound values look at
        self._segments = []
        for graph in split(engine):
            session = load_session(bundle, graph, threads)
            for each in session.get_inputs():
                if each.name in cut:
                    held[each.name] = self._weight(bundle, each, cut[each.name])
            self._segments.append(_Segment(session, held))

    def run(self, batch: Batch) -> list[Any]:
        """Runs one packed call and returns the OrtValues of its outputs; raises AngelForgeError as the group does."""
        values = {name: _value(getattr(batch, name)) for name in INPUTS}
        for index, segment in enumerate(self._segments):
            made = segment.run(values)
            if index + 1 < len(self._segments):
                partial = made[segment.outputs[0]].numpy()
                self._group.all_reduce(partial)
                made[segment.outputs[0]] = _value(partial)
            values |= made
        return [values[name] for name in self._outputs]

    def close(self) -> None:
        """Gives sessions, weights and pools back."""
        self._segments, self._weights, self.pools = [], [], []

    def _weight(self, bundle: Bundle, wanted: Any, cut: Sequence[Any]) -> Any:
        array = read_slice(bundle.tensors[wanted.name], cut)
        if list(array.shape) != wanted.shape:
            raise AngelForgeError(
                f"This rank's part of {wanted.name} is {list(array.shape)}, needed {wanted.shape}. "
                "Build the engine again."
            )
        if wanted.type == "tensor(float8e4m3fn)":
            array = array.view(np.uint8)
            self._weights.append(array)
            return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, _FP8.onnx)
        array = np.ascontiguousarray(array, np.float32)
        self._weights.append(array)
        return _value(array)


class _Segment:
    """One session with all bound that no step changes."""

    def __init__(self, session: Any, held: Mapping[str, Any]) -> None:
        self._session, self._binding = session, session.io_binding()
        names = [each.name for each in session.get_inputs()]
        self._changing = [name for name in names if name not in held]
        for name in names:
            if name in held:
                self._binding.bind_ortvalue_input(name, held[name])
        written = [each.name for each in session.get_outputs() if each.name.startswith("kv_cache_out.")]
        for name in written:  # the pool, in its place
            self._binding.bind_ortvalue_output(name, held[name.replace("_out", "")])
        self.outputs = [each.name for each in session.get_outputs() if each.name not in written]

    def run(self, values: Mapping[str, Any]) -> dict[str, Any]:
        for name in self._changing:
            self._binding.bind_ortvalue_input(name, values[name])
        for name in self.outputs:
            self._binding.bind_output(name, "cpu")
        try:
            self._session.run_with_iobinding(self._binding)
        except ONNXRUNTIME_ERRORS as error:
            raise AngelForgeError(f"ONNX Runtime failed in a step: {error}") from error
        made = self._binding.get_outputs()[-len(self.outputs) :] if self.outputs else []
        return dict(zip(self.outputs, made, strict=True))


def _value(array: Any) -> Any:
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)
