"""Builds a bundle's engine for a target: plan, profiles, engine, and the manifest beside it."""

from dataclasses import dataclass
from datetime import datetime, timezone
from hashlib import sha256
from pathlib import Path
from time import perf_counter

import onnx_ir as ir

from angelforge.atomic import lock, remove_leftovers, write_atomic
from angelforge.bundle import Bundle
from angelforge.diskerrors import explained
from angelforge.engines.limits import BuildOptions, choose_limits, plan_build
from angelforge.engines.manifest import FILE, EngineManifest, bundle_facts, engine_folder, file_digest
from angelforge.engines.network import prepare_network
from angelforge.engines.plan_types import Plan
from angelforge.engines.profiles import Profile, make_profiles
from angelforge.engines.shapes import check_volumes
from angelforge.engines.tensorrt_builder import EngineRequest, build_engine
from angelforge.engines.tensorrt_progress import Report
from angelforge.errors import AngelForgeError, UsageError
from angelforge.plugins.kernel import Gpu
from angelforge.plugins.registry import OPERATORS
from angelforge.plugins.tensorrt.gpu import GpuFacts, require_gpu
from angelforge.plugins.tensorrt.kernels import kernel_digest
from angelforge.plugins.tensorrt.library import Library, load_library
from angelforge.targets import Target

LOG = "build.log"
TIMING_CACHE = "timing.cache"


def build_tensorrt(bundle: Bundle, target: Target, options: BuildOptions, report: Report) -> EngineManifest:
    """Builds the engine of `target`; weights need not be there yet. An interrupted build leaves the last good engine.

    Raises:
        AngelForgeError: the model does not fit, this machine cannot build for the target, TensorRT refuses, another
            build of this engine is running, or the disk refuses.
        UsageError: options that contradict each other.
        KeyboardInterrupt: Ctrl-C.
    """
    begin = perf_counter()
    gpu = None
    if target.backend == "tensorrt":
        gpu = require_gpu()
        _check_gpu(gpu, target)
    prepared = prepare_build(bundle, target, options)
    library = library_of(target)
    folder = engine_folder(bundle, target.name)
    with explained("write", folder):
        folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / ".lock"):
        remove_leftovers(folder)
        request = EngineRequest(
            library=library,
            architecture=target.architecture,
            profiles=prepared.profiles,
            ahead_of_time=Gpu(gpu.architecture, gpu.sms) if gpu and options.plugins == "aot" else None,
            optimization_level=options.optimization_level,
            timing_cache=folder / TIMING_CACHE,
        )
        engine = build_engine(prepared.model, request, folder / LOG, report)
        digest = sha256(engine).hexdigest()
        # Named by content: until the manifest is renamed, it names the last good engine, which is still there.
        name = f"model-{digest[:16]}.engine"
        write_atomic(folder / name, engine)
        manifest = EngineManifest(
            target=target.name,
            backend=library.flavour,
            backend_version=library.version,
            engine=name,
            engine_digest=digest,
            engine_bytes=len(engine),
            graph_digest=graph_digest(bundle),
            draft_digest=draft_digest(bundle),
            architecture=target.architecture,
            gpu=gpu.name if gpu else None,
            driver=gpu.driver if gpu else None,
            tensor_parallel=options.tensor_parallel,
            kernels=kernel_digests(bundle),
            profiles=[profile.to_dict() for profile in prepared.profiles],
            options=options.to_dict() | {"plugins": "aot" if request.ahead_of_time else "python"},
            built_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            seconds=round(perf_counter() - begin, 3),
            **bundle_facts(bundle),
        )
        write_atomic(folder / FILE, manifest.to_json())
        _remove_older_engines(folder, name)
    return manifest


@dataclass(frozen=True)
class Prepared:
    """All that is known before TensorRT starts."""

    model: ir.Model  # for the parser
    weights: tuple[str, ...]  # inputs that are weights
    profiles: tuple[Profile, ...]
    plan: Plan


def prepare_build(bundle: Bundle, target: Target, options: BuildOptions, must_fit: bool = True) -> Prepared:
    """The graph for the parser, and the profiles, checked against each other.

    Raises:
        AngelForgeError: the model must fit and does not, or the graph is not one that TensorRT can take.
        UsageError: options that contradict each other.
    """
    planned = plan_build(bundle, target, options)
    role = "target" if options.tensor_parallel == 1 else f"target-tp{options.tensor_parallel}"
    if role not in bundle.manifest.graphs:
        raise UsageError(
            f"The bundle has no graph for {options.tensor_parallel} ranks, only {', '.join(bundle.manifest.graphs)}."
        )
    model = ir.load(bundle.folder / bundle.manifest.graphs[role])
    weights = prepare_network(model, options.tensor_parallel)
    profiles = make_profiles(choose_limits(bundle, model, planned, options, must_fit))
    check_volumes(model, {symbol: sizes.most for symbol, sizes in profiles[-1].symbols().items()})
    return Prepared(model, weights, profiles, planned)


def library_of(target: Target) -> Library:
    """The library that builds for `target`.

    Raises:
        AngelForgeError: it is not installed.
    """
    assert target.backend != "onnxruntime"
    return load_library(target.backend)


def graph_digest(bundle: Bundle) -> str:
    """Digest of the bundle's graph as it stands on disk now."""
    return file_digest(bundle.folder / bundle.manifest.graphs["target"])


def draft_digest(bundle: Bundle) -> str | None:
    """Digest of the bundle's draft graph as it stands on disk now, None without a draft."""
    draft = bundle.manifest.graphs.get("draft")
    return None if draft is None else file_digest(bundle.folder / draft)


def kernel_digests(bundle: Bundle) -> dict[str, str]:
    """Digests of the kernels of the bundle's operators, as this version has them."""
    return {name: kernel_digest(OPERATORS[name]) for name in bundle.manifest.operators if name in OPERATORS}


def _check_gpu(gpu: GpuFacts, target: Target) -> None:
    if gpu.architecture != target.architecture or gpu.sms != target.sms:
        raise AngelForgeError(
            f"TensorRT builds for the GPU at hand: this is a {gpu.name} ({gpu.architecture}, {gpu.sms} SMs), but "
            f"{target.name} has {target.architecture} and {target.sms} SMs. Build on such a machine, or name the "
            "target that this GPU is."
        )


def _remove_older_engines(folder: Path, current: str) -> None:
    for path in folder.glob("model-*.engine"):
        if path.name != current:
            with explained("remove", path):
                path.unlink(missing_ok=True)
