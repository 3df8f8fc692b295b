"""A rank's part on TensorRT: its slices, its number as an input, a communicator in every context; sums are NCCL's."""

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from support import tensorrt_on_cpu
from support.built import make_bundle

from angelforge.bundle import Bundle
from angelforge.engines.manifest import EngineManifest, bundle_facts
from angelforge.engines.profiles import StepLimits, make_profiles
from angelforge.engines.tensorrt_loading import TensorrtEngine as OpenedEngine
from angelforge.errors import AngelForgeError
from angelforge.exporter.rank_graph import add_rank_graph
from angelforge.runtime import device_sampling
from angelforge.runtime.choosing import Chooser
from angelforge.runtime.device import open_device
from angelforge.runtime.device_torch import TorchWork
from angelforge.runtime.packing import Piece, pack
from angelforge.runtime.ranked_engine import RankedEngine
from angelforge.runtime.sharding import slices
from angelforge.runtime.tensorrt_engine import EngineOptions, TensorRTEngine
from angelforge.runtime.tensorrt_ranks import Communicator


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    _, made = make_bundle(tmp_path_factory.mktemp("tensorrt-ranks"), {"num_hidden_layers": 2})
    return add_rank_graph(made, 2)


def load(bundle: Bundle, rank: int, **options: Any) -> TensorRTEngine:
    profiles = make_profiles(StepLimits(max_tokens=64, max_batch=2, max_context=512, page_size=64, pages=20))
    manifest = EngineManifest(
        target="h20",
        backend="tensorrt",
        backend_version="11.4.0",
        engine="x",
        engine_digest="",
        graph_digest="",
        seconds=0.0,
        tensor_parallel=2,
        **bundle_facts(bundle),
    )
    plan = tensorrt_on_cpu.plan_of(ir.load(bundle.folder / "model.tp2.onnx"))
    cut = slices(bundle.manifest.model, bundle.manifest.precision, rank, 2)
    chosen = EngineOptions(num_pages=20, max_batch=2, slices=cut, rank=rank, **options)
    library = tensorrt_on_cpu.make_library(profiles)
    return TensorRTEngine(bundle, OpenedEngine(manifest, profiles, plan), library, open_device("cpu"), chosen)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_computes_its_part(bundle: Bundle, rank: int) -> None:
    """Without the others' parts, which only NCCL can add, its logits are those of its half of the vocabulary."""
    contexts: list[Any] = []
    engine = load(bundle, rank, on_context=contexts.append, agree=lambda pages: pages - 3)
    own, other = (slice(half * 512, half * 512 + 512) for half in (rank, 1 - rank))
    batch = pack([Piece(np.array([5, 700, 3]), 0, np.array([1], np.int32), 3)], 64)
    logits = engine.forward(batch).numpy()
    assert logits.shape == (3, 1024)
    assert (logits[:, other] == 0).all()
    assert (logits[rank, own] != 0).all()  # ids 5 and 700: each rank knows one
    assert engine.num_pages == 17
    assert next(iter(engine.pools.values())).shape[2] == 1  # of two key/value heads
    assert contexts
    engine.close()


class Group:
    """What is asked of a group, noted down."""

    failure = None

    def __init__(self) -> None:
        self.done: list[str] = []

    def end_at_sigterm(self) -> None:
        self.done.append("end at SIGTERM")

    def send(self, message: bytes) -> None:
        self.done.append("send")

    def close(self) -> None:
        self.done.append("close")

    def communicator(self) -> str:
        self.done.append("communicator")
        return "capsule"

    def barrier(self, patience: int) -> None:
        self.done.append("barrier")


def test_every_context_gets_the_communicator() -> None:
    """One for all, made and given after a barrier: both block until all ranks have come there. A refusal is told."""
    group = Group()
    given = []

    class Context:
        def __init__(self, takes: bool) -> None:
            self.takes = takes

        def set_communicator(self, communicator: str) -> bool:
            given.append((communicator, len(group.done)))
            return self.takes

    communicator = Communicator(group)  # type: ignore[arg-type]
    communicator.give(Context(True))
    communicator.give(Context(True))
    assert group.done == ["barrier", "communicator", "barrier", "barrier"]
    assert given == [("capsule", 3), ("capsule", 4)]
    with pytest.raises(AngelForgeError, match="one libnccl"):
        communicator.give(Context(False))


def test_what_chooses_is_made_ready_before_a_request_comes(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where rank 0 computes with others as where it is alone."""
    ready: list[Any] = []

    class Noted(TorchWork):
        def prepare(self, vocab: int, device: torch.device) -> None:
            ready.append((vocab, device))

    monkeypatch.setattr(device_sampling, "work_of", lambda device: Noted())
    group: Any = Group()
    for engine in (RankedEngine(lambda pages: load(bundle, 0), lambda: 0, group), load(bundle, 0)):
        Chooser.beside(engine)
        engine.close()
    assert ready == [(1024, torch.device("cpu"))] * 2
