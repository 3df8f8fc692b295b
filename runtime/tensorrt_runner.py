"""Steps of one TensorRT engine, each size in a context of its own: decoding is captured, other steps are enqueued."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from angelforge.errors import AngelForgeError
from angelforge.runtime.batch import Batch, Int64
from angelforge.runtime.device import Device, explained_gpu
from angelforge.runtime.packing import Padding
from angelforge.runtime.tensorrt_bindings import check_addresses
from angelforge.runtime.tensorrt_buckets import Bucket, Buckets
from angelforge.runtime.tensorrt_inputs import InputArena, InputLayout, layout_of
from angelforge.runtime.tensorrt_session import TensorrtContext, TensorrtSession

Before = Callable[[InputArena, InputLayout], None]  # puts work on the stream that a step begins with


@dataclass(frozen=True, eq=False)
class Fixed:
    """What no step changes."""

    addresses: Mapping[str, int]  # of weights, pool, states and outputs
    shapes: Mapping[str, tuple[int, ...]]  # of pool and states; −1 stands for the tokens of a step
    activations: Any  # torch.Tensor uint8, shared by all contexts
    page_size: int
    largest: Padding  # sizes that no step exceeds


class Runner:
    """Runs batches; what they make stands in the output buffers until the next."""

    def __init__(
        self,
        session: TensorrtSession,
        device: Device,
        stream: Any,
        buckets: Buckets,
        fixed: Fixed,
        before: Before | None = None,
    ) -> None:
        """Raises AngelForgeError where the device has no room for the inputs."""
        self._session, self._device, self._stream = session, device, stream
        self._buckets, self._fixed, self._before = buckets, fixed, before
        layout = InputLayout(fixed.largest)
        check_addresses([name for name in session.names if name not in layout.shapes], fixed.addresses)
        self._arena = InputArena(device, layout.nbytes)
        self._replays: dict[Bucket, Callable[[], None]] = {}
        self._captured: list[TensorrtContext] = []  # they live as long as the graphs made of them
        self._steps: dict[Bucket, Callable[[], None]] = {}  # of those that are not captured, since their first one

    def capture(self) -> None:
        """Captures every bucket, each in a context of its own, after one run on padding alone.

        A first run loads kernels and sets up what TensorRT puts off, which must not happen within a capture. Raises
        AngelForgeError where TensorRT or the device fails.
        """
        with explained_gpu():
            self._capture()

    def _capture(self) -> None:
        self._device.follow(self._stream, None)  # which clears the pool
        for bucket in self._buckets.captured:
            layout = layout_of(bucket.size)
            context = self._new_context(bucket.profile)
            self._captured.append(context)
            work = self._step(context, layout)
            self._arena.send(layout, _NOTHING, np.zeros(1, np.int64), self._fixed.page_size, self._stream)
            with self._device.on(self._stream):
                work()
            self._device.wait(self._device.mark(self._stream))
            self._replays[bucket] = self._device.capture(work, self._stream)

    def run(self, batch: Batch, rows: Int64 | None = None) -> None:
        """Puts a step on the stream, after what torch's current stream holds and before what will come there.

        Raises:
            AngelForgeError: the step is larger than the engine's profiles, TensorRT refuses it, or the device fails in
                this or earlier work.
        """
        with self._device.bound(), explained_gpu():
            self._run(batch, rows)

    def _run(self, batch: Batch, rows: Int64 | None) -> None:
        bucket, _ = self._buckets.choose(batch)
        layout = layout_of(bucket.size)
        self._device.follow(self._stream, None)
        self._arena.send(layout, batch, rows, self._fixed.page_size, self._stream)
        replay = self._replays.get(bucket)
        if replay is not None:
            replay()
        else:
            if bucket not in self._steps:
                self._steps[bucket] = self._step(self._new_context(bucket.profile), layout)
            with self._device.on(self._stream):
                self._steps[bucket]()
        self._device.follow(None, self._stream)

    def close(self) -> None:
        """Gives graphs, contexts and engine back, in this order."""
        with suppress(AngelForgeError):  # what failed has been told; the memory goes all the same
            self._device.wait(self._device.mark(self._stream))
        self._replays.clear()
        self._captured.clear()
        self._steps.clear()
        self._session.close()

    def _new_context(self, profile: int) -> TensorrtContext:
        fixed, handle = self._fixed, self._device.handle(self._stream)
        constant = {name: shape for name, shape in fixed.shapes.items() if min(shape) >= 0}
        return self._session.context(profile, fixed.activations, constant, fixed.addresses, handle)

    def _step(self, context: TensorrtContext, layout: InputLayout) -> Callable[[], None]:
        """Binds a context to a layout, for good; the result enqueues the step."""
        self._arena.keep(layout)
        names = [name for name in layout.shapes if name in self._session.names]
        addresses, tokens = self._arena.addresses(layout), layout.size.tokens
        shapes = {name: layout.shapes[name] for name in names}
        for name, shape in self._fixed.shapes.items():
            if min(shape) < 0:
                shapes[name] = tuple(tokens if size < 0 else size for size in shape)
        context.place(shapes, {name: addresses[name] for name in names})
        handle = self._device.handle(self._stream)

        def work() -> None:
            if self._before is not None:
                self._before(self._arena, layout)
            context.run(handle)

        return work


_NOTHING = Batch(
    input_ids=np.zeros(1, np.int64),
    positions=np.zeros(1, np.int32),
    num_tokens=np.zeros(1, np.int32),  # every row is padding
    query_start=np.zeros(2, np.int32),
    kv_length=np.zeros(1, np.int32),
    page_table=np.zeros((1, 1), np.int32),
    slots=np.zeros(1, np.int32),
    logit_indices=np.zeros(1, np.int64),
)
