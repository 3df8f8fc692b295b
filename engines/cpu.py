"""Builds the engines that ONNX Runtime runs: an optimised ONNX graph beside its manifest; weights stay where they are.

Of target `cpu`, and of `cuda`: the same graph, on any NVIDIA GPU. Both are built on any machine.
"""

from hashlib import sha256
from pathlib import Path
from time import perf_counter

import onnx_ir as ir
import onnxruntime

from angelforge.atomic import lock, remove_leftovers, write_atomic
from angelforge.bundle import Bundle
from angelforge.diskerrors import explained
from angelforge.engines.manifest import (
    MANIFESTS,
    EngineManifest,
    bundle_facts,
    engine_folder,
    file_digest,
    graph_facts,
    graph_file,
    remove_older_engines,
)
from angelforge.engines.onnxruntime_graph import optimize
from angelforge.engines.segments import cut, join
from angelforge.engines.widen import widen_activations
from angelforge.targets import get_target

__all__ = ["TARGET", "build_cpu", "build_onnxruntime", "engine_folder", "open_draft_engine", "open_engine"]

TARGET = "cpu"


def build_cpu(bundle: Bundle, ranks: int = 1) -> EngineManifest:
    """The same as `build_onnxruntime` for target `cpu`."""
    return build_onnxruntime(bundle, TARGET, ranks)


def build_onnxruntime(bundle: Bundle, target: str, ranks: int = 1) -> EngineManifest:
    """Optimises the bundle's graphs for this machine's ONNX Runtime; bf16 is widened to f32 on the way.

    For several `ranks` the target's graph becomes a row of segments, between which the ranks sum.

    A draft is built with its target, as a pair: each manifest names the other's graph. Returns the target's. An
    interrupted build leaves the last good engines.

    Raises:
        AngelForgeError: a graph cannot be built, another build of this engine is running, or the disk refuses.
        UsageError: the target takes no ranks.
    """
    get_target(target).check_ranks(ranks)
    folder = engine_folder(bundle, target, ranks)
    with explained("create", folder):
        folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / ".lock"):
        remove_leftovers(folder)
        made = {
            role: _build(bundle, role, folder, target, ranks) for role in MANIFESTS if role in bundle.manifest.graphs
        }
        for role, manifest in made.items():
            write_atomic(folder / MANIFESTS[role], manifest.to_json())
        remove_older_engines(folder, {manifest.engine for manifest in made.values()})
    return made["target"]


def _build(bundle: Bundle, role: str, folder: Path, target: str, ranks: int) -> EngineManifest:
    """Builds and writes one engine, named by its content: the last good one, which its manifest names, stays."""
    begin = perf_counter()
    graph = graph_file(bundle, role, ranks)
    model = ir.load(graph)
    widen_activations(model)
    segmented = role == "target" and ranks > 1
    fuse = target == TARGET  # another provider might not have what is fused for the CPU's
    engine = join([optimize(segment, fuse) for segment in cut(model)]) if segmented else optimize(model, fuse)
    digest = sha256(engine).hexdigest()
    name = f"{graph.stem}-{digest[:16]}.{'zip' if segmented else 'onnx'}"
    write_atomic(folder / name, engine)
    return EngineManifest(
        target=target,
        backend="onnxruntime",
        backend_version=onnxruntime.__version__,
        engine=name,
        engine_digest=digest,
        engine_bytes=len(engine),
        architecture=get_target(target).architecture,
        tensor_parallel=ranks,
        seconds=round(perf_counter() - begin, 3),
        **bundle_facts(bundle),
        **graph_facts(bundle, role, ranks),
    )


def open_engine(bundle: Bundle, ranks: int = 1, target: str = TARGET) -> bytes:
    """The engine's graph, after comparing it with its manifest, the bundle and the installed ONNX Runtime.

    For several ranks an archive of segments.

    Raises:
        AngelForgeError: no engine, a damaged one, or one made for something else; the message says which.
    """
    return _open(bundle, "target", ranks, target)


def open_draft_engine(bundle: Bundle, ranks: int = 1, target: str = TARGET) -> bytes:
    """The same for the engine of the bundle's draft, which must have been built beside this target."""
    return _open(bundle, "draft", ranks, target)


def _open(bundle: Bundle, role: str, ranks: int, target: str) -> bytes:
    folder = engine_folder(bundle, target, ranks)
    manifest = EngineManifest.load(folder, MANIFESTS[role])
    manifest.require({"backend": "onnxruntime", "backend_version": onnxruntime.__version__})
    manifest.require_bundle(bundle, role, ranks)
    manifest.require({"engine_digest": file_digest(folder / manifest.engine)})
    return (folder / manifest.engine).read_bytes()
