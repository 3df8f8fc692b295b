"""Builds the engine of target `cpu`: an optimised ONNX graph beside its manifest; the weights stay where they are."""

from time import perf_counter

import onnx_ir as ir
import onnxruntime

from angelforge.atomic import lock, write_atomic
from angelforge.bundle import Bundle
from angelforge.engines.manifest import FILE, EngineManifest, bundle_facts, engine_folder, file_digest
from angelforge.engines.onnxruntime_graph import optimize
from angelforge.engines.widen import widen_activations

__all__ = ["ENGINE", "TARGET", "build_cpu", "engine_folder", "open_engine"]

ENGINE = "model.onnx"
TARGET = "cpu"


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
