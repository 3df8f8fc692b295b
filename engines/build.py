"""Builds a bundle's TensorRT engines for a target, draft and target as a pair, each with a manifest beside it."""

from dataclasses import dataclass
from datetime import datetime, timezone
from hashlib import sha256
from pathlib import Path
from time import perf_counter

from angelforge.atomic import lock, remove_leftovers, write_atomic
from angelforge.bundle import Bundle
from angelforge.diskerrors import explained
from angelforge.engines.limits import BuildOptions, draft_depth
from angelforge.engines.manifest import (
    MANIFESTS,
    EngineManifest,
    bundle_facts,
    engine_folder,
    graph_facts,
    remove_older_engines,
)
from angelforge.engines.preparation import Prepared, PreparedGraph, prepare_build
from angelforge.engines.tensorrt_builder import EngineRequest, build_engine
from angelforge.engines.tensorrt_layers import LOGS, read_activation_bytes
from angelforge.engines.tensorrt_progress import Report, part
from angelforge.errors import AngelForgeError
from angelforge.plugins.kernel import Gpu
from angelforge.plugins.registry import OPERATORS
from angelforge.plugins.tensorrt.gpu import GpuFacts, require_gpu
from angelforge.plugins.tensorrt.kernels import kernel_digest
from angelforge.plugins.tensorrt.library import Library, load_library
from angelforge.targets import Target

TIMING_CACHE = "timing.cache"
_PREFIXES = {"target": "model", "draft": "draft"}
_SAME_MEMORY = 0.08  # cards of one kind differ by what is reserved for error correction
_DRAFT_SHARE = 0.1  # of the time that a build of both takes


def build_tensorrt(bundle: Bundle, target: Target, options: BuildOptions, report: Report) -> EngineManifest:
    """Builds the engine of `target`, and of the bundle's draft; weights need not be there yet. Returns the target's.

    An interrupted build leaves the last good engines.

    Raises:
        AngelForgeError: the model does not fit, this machine cannot build for the target, TensorRT refuses, another
            build of this engine is running, or the disk refuses.
        UsageError: options that contradict each other.
        KeyboardInterrupt: Ctrl-C.
    """
    gpu = None
    if target.backend == "tensorrt":
        gpu = require_gpu()
        _check_gpu(gpu, target)
    prepared = prepare_build(bundle, target, options)
    folder = engine_folder(bundle, target.name, options.tensor_parallel)
    job = _Job(bundle, target, options, prepared, library_of(target), gpu, folder)
    with explained("write", job.folder):
        job.folder.mkdir(parents=True, exist_ok=True)
    with lock(job.folder / ".lock"):
        remove_leftovers(job.folder)
        made, done = [], 0.0
        for graph in prepared.graphs:
            share = _DRAFT_SHARE if graph.role == "draft" else 1.0 - done
            made.append(_build(job, graph, part(report, done, share)))
            done += share
        for manifest, graph in zip(made, prepared.graphs, strict=True):
            write_atomic(job.folder / MANIFESTS[graph.role], manifest.to_json())
        remove_older_engines(job.folder, {manifest.engine for manifest in made})
    return made[-1]


@dataclass(frozen=True)
class _Job:
    """What the engines of one build have in common."""

    bundle: Bundle
    target: Target
    options: BuildOptions
    prepared: Prepared
    library: Library
    gpu: GpuFacts | None  # where TensorRT builds for the GPU at hand
    folder: Path


def _build(job: _Job, graph: PreparedGraph, report: Report) -> EngineManifest:
    """Builds and writes one engine, named by its content: the last good one, which its manifest names, stays."""
    begin = perf_counter()
    ahead = job.gpu is not None and job.options.plugins == "aot"
    request = EngineRequest(
        library=job.library,
        architecture=job.target.architecture,
        profiles=job.prepared.profiles,
        ahead_of_time=Gpu(job.gpu.architecture, job.gpu.sms) if job.gpu and ahead else None,
        optimization_level=job.options.optimization_level,
        timing_cache=job.folder / TIMING_CACHE,
    )
    log = job.folder / LOGS[graph.role]
    engine = build_engine(graph.model, request, log, report)
    digest = sha256(engine).hexdigest()
    name = f"{_PREFIXES[graph.role]}-{digest[:16]}.engine"
    write_atomic(job.folder / name, engine)
    depth = draft_depth(job.bundle, job.options)
    return EngineManifest(
        target=job.target.name,
        backend=job.library.flavour,
        backend_version=job.library.version,
        engine=name,
        engine_digest=digest,
        engine_bytes=len(engine),
        architecture=job.target.architecture,
        gpu=job.gpu.name if job.gpu else None,
        driver=job.gpu.driver if job.gpu else None,
        tensor_parallel=job.options.tensor_parallel,
        kernels=kernel_digests(job.bundle),
        profiles=[profile.to_dict() for profile in job.prepared.profiles],
        activation_bytes=read_activation_bytes(log),
        options=job.options.to_dict() | {"draft_depth": depth, "plugins": "aot" if ahead else "python"},
        built_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        seconds=round(perf_counter() - begin, 3),
        **bundle_facts(job.bundle),
        **graph_facts(job.bundle, graph.role, job.options.tensor_parallel),
    )


def library_of(target: Target) -> Library:
    """The library that builds for `target`.

    Raises:
        AngelForgeError: it is not installed.
    """
    assert target.backend != "onnxruntime"
    return load_library(target.backend)


def kernel_digests(bundle: Bundle) -> dict[str, str]:
    """Digests of the kernels of the bundle's operators, as this version has them."""
    return {name: kernel_digest(OPERATORS[name]) for name in bundle.manifest.operators if name in OPERATORS}


def _check_gpu(gpu: GpuFacts, target: Target) -> None:
    wanted = target.memory_bytes or gpu.memory_bytes
    alike = abs(gpu.memory_bytes - wanted) < _SAME_MEMORY * wanted
    if gpu.architecture != target.architecture or gpu.sms != target.sms or not alike:
        raise AngelForgeError(
            f"TensorRT builds for the GPU at hand: this is a {gpu.name} ({gpu.architecture}, {gpu.sms} SMs, "
            f"{gpu.memory_bytes / 1e9:.0f} GB), but {target.name} has {target.architecture}, {target.sms} SMs and "
            f"{wanted / 1e9:.0f} GB. Build on such a machine, or name the target that this GPU is."
        )
