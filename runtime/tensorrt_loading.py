"""From a bundle and a target with TensorRT to running engines; what this machine lacks is told beforehand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from angelforge.bundle import Bundle
from angelforge.engines.tensorrt_loading import TensorrtEngine as OpenedEngine
from angelforge.engines.tensorrt_loading import open_tensorrt_engine
from angelforge.errors import AngelForgeError
from angelforge.plugins.registry import OPERATORS
from angelforge.plugins.tensorrt.adapter import register
from angelforge.plugins.tensorrt.gpu import GpuFacts, find_gpu
from angelforge.plugins.tensorrt.library import Library, load_library
from angelforge.runtime.weight_layout import Slices
from angelforge.targets import Target

if TYPE_CHECKING:
    from angelforge.runtime.tensorrt_draft import TensorRTDraft
    from angelforge.runtime.tensorrt_engine import TensorRTEngine


@dataclass(frozen=True)
class Rank:
    """One of `count` processes that share a model, each with a GPU."""

    index: int = 0  # also the number of its GPU
    count: int = 1
    slices: Slices = field(default_factory=dict)  # what it takes of each weight
    on_context: Callable[[Any], None] | None = None  # gives every IExecutionContext its communicator
    agree: Callable[[int], int] | None = None  # on the pages of the pool: the least of all ranks


@dataclass(frozen=True)
class Wish:
    """What an engine is loaded for; None: chosen from the device's memory."""

    num_pages: int | None = None
    kv_memory: int | None = None  # bytes of the pool
    max_batch: int = 32
    draft: bool = False  # a draft will be loaded beside it
    cuda_graphs: bool = True  # decoding is captured
    report: Callable[[int, int], None] | None = None  # bytes of weights loaded, and all


@dataclass(frozen=True)
class Machine:
    """What runs an engine."""

    library: Library
    gpu: GpuFacts


def require_machine(target: Target, index: int = 0) -> Machine:
    """TensorRT for the target, its GPU of that number, and torch.

    Raises:
        AngelForgeError: one of them is missing; everything that is, and what to do.
    """
    assert target.backend != "onnxruntime"
    missing = []
    gpu = find_gpu(index)
    if gpu is None:
        which = "" if index == 0 else f" number {index}"
        missing.append(f"no NVIDIA GPU{which} with a working driver was found (580 or newer is needed)")
    library = None
    try:
        library = load_library(target.backend)
    except AngelForgeError as error:
        missing.append(str(error).rstrip("."))
    if find_spec("torch") is None:
        missing.append("torch is not installed; pip install 'angelforge[torch]' with a build for CUDA 13")
    if find_spec("triton") is None:  # for the kernels that choose tokens
        missing.append("triton is not installed; pip install 'angelforge[triton]'")
    if gpu is None or library is None or missing:
        raise AngelForgeError(
            f"Target {target.name} cannot run on this machine: {'; '.join(missing)}. angelforge doctor says more; "
            "target cpu runs anywhere."
        )
    return Machine(library, gpu)


def load_tensorrt(bundle: Bundle, target: Target, wish: Wish, rank: Rank | None = None) -> TensorRTEngine:
    """The engine of `target`, loaded on this machine's GPU.

    Raises:
        AngelForgeError: something is missing here, the engine is missing, damaged or made for something else, or the
            GPU is too small.
        UsageError: a wish that the engine cannot grant.
    """
    rank = rank or Rank()
    machine = require_machine(target, rank.index)
    opened = open_tensorrt_engine(bundle, target, machine.library, machine.gpu, rank.count)
    register_plugins(opened, machine.library)

    from angelforge.runtime.device import open_device
    from angelforge.runtime.tensorrt_draft import draft_needs
    from angelforge.runtime.tensorrt_engine import EngineOptions, TensorRTEngine

    drafted = draft_needs(bundle, target.name, opened.profiles, rank.count) if wish.draft else None
    options = EngineOptions(
        num_pages=wish.num_pages,
        kv_memory=wish.kv_memory,
        max_batch=wish.max_batch,
        drafted=drafted,
        slices=rank.slices,
        on_context=rank.on_context,
        agree=rank.agree,
        rank=rank.index if rank.count > 1 else None,
        cuda_graphs=wish.cuda_graphs,
        report=wish.report,
    )
    return TensorRTEngine(bundle, opened, machine.library, open_device(f"cuda:{rank.index}"), options)


def load_tensorrt_draft(
    bundle: Bundle, target: Target, engine: TensorRTEngine, rank: Rank | None = None
) -> TensorRTDraft:
    """The engine of the bundle's draft, beside the target's.

    Raises:
        AngelForgeError: as `load_tensorrt`, or there is no draft.
    """
    from angelforge.runtime.tensorrt_draft import TensorRTDraft

    if bundle.manifest.draft is None:
        raise AngelForgeError(f"The bundle {bundle.folder} has no draft. Export it with --draft DIR.")
    rank = rank or Rank()
    machine = require_machine(target, rank.index)
    opened = open_tensorrt_engine(bundle, target, machine.library, machine.gpu, rank.count, "draft")
    return TensorRTDraft(bundle, opened, engine)


def register_plugins(opened: OpenedEngine, library: Library) -> None:
    """Registers the plugins of an engine that launches kernels from Python; one with PTX needs none."""
    if opened.manifest.options.get("plugins") != "python":
        return
    register(library, OPERATORS.values())
