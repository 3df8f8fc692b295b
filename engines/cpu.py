"""Builds the engine of target `cpu`: an optimised ONNX graph beside its manifest; the weights stay where they are."""

from time import perf_counter
from typing import Any

import onnx_ir as ir
import onnxruntime

from angelforge.atomic import lock, remove_leftovers, write_atomic
from angelforge.bundle import Bundle
from angelforge.diskerrors import explained
from angelforge.engines.manifest import DRAFT_FILE, FILE, EngineManifest, bundle_facts, engine_folder, file_digest
from angelforge.engines.onnxruntime_graph import optimize
from angelforge.engines.widen import widen_activations

__all__ = ["DRAFT_ENGINE", "ENGINE", "TARGET", "build_cpu", "engine_folder", "open_draft_engine", "open_engine"]

ENGINE = "model.onnx"
DRAFT_ENGINE = "draft.onnx"
TARGET = "cpu"


def build_cpu(bundle: Bundle) -> EngineManifest:
    """Optimises the bundle's graphs for this machine's ONNX Runtime; bf16 is widened to f32 on the way.

    A draft is built with its target, as a pair: each manifest names the other's graph. Returns the target's.

    Raises:
        AngelForgeError: a graph cannot be built, another build of this engine is running, or the disk refuses.
    """
    folder = engine_folder(bundle, TARGET)
    with explained("create", folder):
        folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / ".lock"):
        remove_leftovers(folder)
        if "draft" in bundle.manifest.graphs:
            _build(bundle, "draft", DRAFT_ENGINE, DRAFT_FILE)
        return _build(bundle, "target", ENGINE, FILE)


def _build(bundle: Bundle, role: str, engine: str, file: str) -> EngineManifest:
    begin = perf_counter()
    folder = engine_folder(bundle, TARGET)
    graph = bundle.folder / bundle.manifest.graphs[role]
    model = ir.load(graph)
    widen_activations(model)
    write_atomic(folder / engine, optimize(model))
    manifest = EngineManifest(
        target=TARGET,
        backend="onnxruntime",
        backend_version=onnxruntime.__version__,
        engine=engine,
        engine_digest=file_digest(folder / engine),
        graph_digest=file_digest(graph),
        seconds=round(perf_counter() - begin, 3),
        **bundle_facts(bundle),
        **_pair(bundle, role),
    )
    write_atomic(folder / file, manifest.to_json())
    return manifest


def open_engine(bundle: Bundle) -> bytes:
    """The engine's graph, after comparing it with its manifest, the bundle and the installed ONNX Runtime.

    Raises:
        AngelForgeError: no engine, a damaged one, or one made for something else; the message says which.
    """
    return _open(bundle, "target", FILE)


def open_draft_engine(bundle: Bundle) -> bytes:
    """The same for the engine of the bundle's draft, which must have been built beside this target."""
    return _open(bundle, "draft", DRAFT_FILE)


def _open(bundle: Bundle, role: str, file: str) -> bytes:
    folder = engine_folder(bundle, TARGET)
    manifest = EngineManifest.load(folder, file)
    manifest.require({"backend": "onnxruntime", "backend_version": onnxruntime.__version__, **bundle_facts(bundle)})
    manifest.require(_pair(bundle, role))
    manifest.require({"graph_digest": file_digest(bundle.folder / bundle.manifest.graphs[role])})
    manifest.require({"engine_digest": file_digest(folder / manifest.engine)})
    return (folder / manifest.engine).read_bytes()


def _pair(bundle: Bundle, role: str) -> dict[str, Any]:
    """What ties the engines of a target and its draft together: the digest of the other's graph."""
    graphs = bundle.manifest.graphs
    draft = file_digest(bundle.folder / graphs["draft"]) if "draft" in graphs else None
    target = file_digest(bundle.folder / graphs["target"]) if role == "draft" else None
    return {"draft_digest": draft, "target_digest": target}
