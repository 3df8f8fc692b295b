"""Builds the engine of target `cpu`: an optimised ONNX graph beside its manifest; the weights stay where they are."""

from pathlib import Path
from time import perf_counter
from typing import Any

import onnx_ir as ir
import onnxruntime

from angelforge.atomic import lock, write_atomic
from angelforge.bundle import Bundle
from angelforge.engines.manifest import FILE, EngineManifest, file_digest
from angelforge.engines.onnxruntime_graph import optimize
from angelforge.engines.widen import widen_activations

ENGINE = "model.onnx"
TARGET = "cpu"


def engine_folder(bundle: Bundle, target: str) -> Path:
    """Where the engine for `target` stands in a bundle."""
    return bundle.folder / "engines" / target


def build_cpu(bundle: Bundle) -> EngineManifest:
    """Optimises the bundle's graph for this machine's ONNX Runtime; bf16 is widened to f32 on the way.

    Raises:
        AngelForgeError: the graph cannot be built, another build of this engine is running, or the disk refuses.
    """
    begin = perf_counter()
    folder = engine_folder(bundle, TARGET)
    folder.mkdir(parents=True, exist_ok=True)
    graph = bundle.folder / bundle.manifest.graphs["target"]
    with lock(folder / ".lock"):
        model = ir.load(graph)
        widen_activations(model)
        write_atomic(folder / ENGINE, optimize(model))
        manifest = EngineManifest(
            target=TARGET,
            backend="onnxruntime",
            backend_version=onnxruntime.__version__,
            engine=ENGINE,
            engine_digest=file_digest(folder / ENGINE),
            graph_digest=file_digest(graph),
            seconds=round(perf_counter() - begin, 3),
            **bundle_facts(bundle),
        )
        write_atomic(folder / FILE, manifest.to_json())
    return manifest


def bundle_facts(bundle: Bundle) -> dict[str, Any]:
    """What a bundle says that its engines must agree with, by the names of `EngineManifest`."""
    manifest = bundle.manifest
    return {
        "model_digest": manifest.model_digest,
        "precision": manifest.precision.value,
        "max_context": manifest.max_context,
        "page_size": manifest.page_size,
        "operators": dict(manifest.operators),
    }


def open_engine(bundle: Bundle) -> bytes:
    """The engine's graph, after comparing it with its manifest, the bundle and the installed ONNX Runtime.

    Raises:
        AngelForgeError: no engine, a damaged one, or one made for something else; the message says which.
    """
    folder = engine_folder(bundle, TARGET)
    manifest = EngineManifest.load(folder)
    manifest.require({"backend": "onnxruntime", "backend_version": onnxruntime.__version__, **bundle_facts(bundle)})
    manifest.require({"graph_digest": file_digest(bundle.folder / bundle.manifest.graphs["target"])})
    manifest.require({"engine_digest": file_digest(folder / manifest.engine)})
    return (folder / manifest.engine).read_bytes()
