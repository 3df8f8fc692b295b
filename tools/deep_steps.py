"""The steps of `doctor --deep`: each runs in a process of its own, since what is tried here may end a process.

`python -m angelforge.tools.deep_steps NAME FOLDER` prints what was found as its last line; an error ends it with a
message and code 1.
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from angelforge.bundle import Bundle
from angelforge.errors import AngelForgeError
from angelforge.precision import Precision
from angelforge.runtime.batch import Batch
from angelforge.targets import Backend, Target

PROMPT, PAGES, CONTEXT = 300, 9, 512  # more tokens than the largest decode profile has
# Norm of the difference over the norm: bf16 rounding through a random model of four layers stays well below.
TOLERANCE = 0.1

Arrays = dict[str, np.ndarray[Any, Any]]


def small_bundle(folder: Path, precision: Precision) -> Bundle:
    """A random model of the architecture with its CPU engine, made once in `folder`."""
    from angelforge.engines.cpu import build_cpu
    from angelforge.exporter.export import ExportOptions, export
    from angelforge.exporter.synthetic import small_config, write_checkpoint

    target = folder / f"bundle-{precision.value}"
    if not target.is_dir():
        source = write_checkpoint(folder / f"checkpoint-{precision.value}", small_config(), dtype="BF16")
        build_cpu(export(str(source), target, ExportOptions(precision=precision)))
    return Bundle.open(target)


def steps() -> tuple[Batch, Batch]:
    """A prompt, and the decoding of one token after it."""
    rng = np.random.default_rng(0)

    def batch(ids: np.ndarray[Any, Any], begin: int) -> Batch:
        count = len(ids)
        positions = np.arange(begin, begin + count, dtype=np.int32)
        return Batch(
            input_ids=ids,
            positions=positions,
            num_tokens=np.array([count], np.int32),
            query_start=np.array([0, count], np.int32),
            kv_length=np.array([begin + count], np.int32),
            page_table=np.arange(1, PAGES, dtype=np.int32)[None, :],
            slots=positions + 64,  # sequence pages 1, 2, … of 64 tokens
            logit_indices=np.array([count - 1], np.int64),
        )

    return batch(rng.integers(0, 1000, PROMPT), 0), batch(rng.integers(0, 1000, 1), PROMPT)


def compare(bundle: Bundle, run: Callable[[Batch, Arrays, int], tuple[np.ndarray[Any, Any], Arrays]]) -> str:
    """Runs both steps with `run` (batch, pools, tokens → logits, pools) and on ONNX Runtime.

    Raises:
        AngelForgeError: logits or pools differ by more than rounding explains.
    """
    from angelforge.runtime.onnxruntime_engine import OnnxRuntimeEngine

    reference = OnnxRuntimeEngine(bundle, PAGES)
    config = bundle.manifest.model
    shape = (PAGES, 2, config.num_key_value_heads, bundle.manifest.page_size, config.head_dim)
    dtype = bundle.manifest.precision.activation.numpy
    pools: Arrays = {f"kv_cache.{i}": np.zeros(shape, dtype) for i in range(config.num_hidden_layers)}
    errors = {}
    for name, batch in zip(("prompt", "decode"), steps(), strict=True):
        logits, pools = run(batch, pools, len(batch.input_ids))
        errors[name] = _relative(logits, reference.forward(batch))
    expected = np.stack([np.asarray(pool) for pool in reference.pools])[:, 1:]  # page 0 is nobody's
    errors["pool"] = _relative(np.stack(list(pools.values())).astype(np.float32)[:, 1:], expected)
    text = ", ".join(f"{name} {value:.2g}" for name, value in errors.items())
    if not all(value <= TOLERANCE for value in errors.values()):
        raise AngelForgeError(f"differs from ONNX Runtime, relative error: {text} (at most {TOLERANCE} expected)")
    return f"relative error against ONNX Runtime: {text}"


def engine(folder: Path, precision: Precision, backend: Backend, plugins: Any) -> str:
    """Builds the small model's engine on this machine, runs it, and compares."""
    from angelforge.engines.build import build_tensorrt, library_of
    from angelforge.engines.limits import BuildOptions
    from angelforge.engines.manifest import engine_folder
    from angelforge.engines.tensorrt_once import run_once
    from angelforge.plugins.registry import OPERATORS
    from angelforge.plugins.tensorrt.adapter import register
    from angelforge.tensorfile import read_tensor

    bundle = small_bundle(folder, precision)
    target = this_gpu(backend)
    begin = perf_counter()
    options = BuildOptions(max_tokens=512, max_batch=4, pages=PAGES, plugins=plugins)
    manifest = build_tensorrt(bundle, target, options, lambda phase, share: None)
    built = f"built in {perf_counter() - begin:.1f} s, {manifest.engine_bytes / 1e6:.2f} MB"
    library = library_of(target)
    if manifest.options["plugins"] == "python":
        register(library, OPERATORS.values())
    plan = (engine_folder(bundle, target.name) / manifest.engine).read_bytes()
    weights = {name: read_tensor(info) for name, info in bundle.tensors.items()}
    vocabulary = bundle.manifest.model.vocab_size

    def run(batch: Batch, pools: Arrays, tokens: int) -> tuple[np.ndarray[Any, Any], Arrays]:
        limits = [profile["tokens"]["most"] for profile in manifest.profiles]
        profile = next(i for i, most in enumerate(limits) if tokens <= most)
        results = {"logits": np.empty((1, vocabulary), np.float32)}
        results |= {name.replace("kv_cache", "kv_cache_out"): np.empty_like(pool) for name, pool in pools.items()}
        in_place = {name: name.replace("kv_cache_out", "kv_cache") for name in results if name != "logits"}
        run_once(library, plan, {**vars(batch), **pools, **weights}, results, in_place, profile)
        return results["logits"], {in_place[name]: results[name] for name in in_place}

    return f"{compare(bundle, run)}; {built}"


def this_gpu(backend: Backend) -> Target:
    """A target that is the GPU at hand.

    Raises:
        AngelForgeError: there is none.
    """
    from angelforge.plugins.tensorrt.gpu import require_gpu

    gpu = require_gpu()
    return Target("this-gpu", gpu.architecture, gpu.memory_bytes, None, gpu.sms, None, None, None, backend)


def runtime(folder: Path, backend: Backend, plugins: Any) -> str:
    """Runs the small model through the engine that `run` and `serve` use, and compares."""
    from angelforge.engines.build import build_tensorrt
    from angelforge.engines.limits import BuildOptions
    from angelforge.runtime.tensorrt_loading import Wish, load_tensorrt
    from angelforge.tools.deep_runtime import runner_of, step_microseconds

    bundle, target = small_bundle(folder, Precision.BF16), this_gpu(backend)
    options = BuildOptions(max_tokens=512, max_batch=4, pages=PAGES, plugins=plugins)
    build_tensorrt(bundle, target, options, lambda phase, share: None)
    loaded = load_tensorrt(bundle, target, Wish(num_pages=PAGES, max_batch=4))
    try:
        text = compare(bundle, runner_of(loaded))
        return f"{text}; {step_microseconds(loaded, steps()[1]):.0f} µs a decoding step"
    finally:
        loaded.close()


def sampling() -> str:
    """Compares sampling on the GPU with the host's, and times it at batch 32 over the real vocabulary."""
    from angelforge.tools.deep_runtime import compare_sampling

    this_gpu("tensorrt")
    return compare_sampling("cuda:0")


def large_tensor(folder: Path) -> str:
    """Whether TensorRT takes a tensor of exactly 2³¹ elements, which this project avoids."""
    import onnx_ir as ir

    from angelforge.engines.build import library_of
    from angelforge.engines.tensorrt_builder import EngineRequest, build_engine

    target = this_gpu("tensorrt")
    x, index = ir.val("x", ir.DataType.BFLOAT16, [2**19, 2**12]), ir.val("index", ir.DataType.INT64, [1])
    node = ir.node("Gather", [x, index], {"axis": 0}, name="gather")
    node.outputs[0].name, node.outputs[0].dtype = "y", ir.DataType.BFLOAT16
    graph = ir.Graph([x, index], node.outputs, nodes=[node], opset_imports={"": 24, "angelforge": 1}, name="large")
    request = EngineRequest(library_of(target), target.architecture, ())
    try:
        build_engine(ir.Model(graph, ir_version=11), request, folder / "large.log", lambda phase, share: None)
    except AngelForgeError as error:
        return f"refused, as documented: {error}"
    return "accepted, though documented as too large"


def without_python(folder: Path) -> str:
    """Loads the ahead-of-time engine where nothing of this project is registered."""
    from angelforge.engines.tensorrt_runtime import make_runtime
    from angelforge.plugins.tensorrt.library import load_library

    library = load_library("tensorrt")
    [plan] = (folder / "bundle-bf16" / "engines" / "this-gpu").glob("*.engine")
    loaded = make_runtime(library).deserialize_cuda_engine(plan.read_bytes())
    if loaded is None:
        raise AngelForgeError("TensorRT cannot load the engine: it seems to need the plugins in Python after all.")
    return f"loads; {loaded.num_layers} layers, {loaded.device_memory_size_v2 / 1e6:.1f} MB of activations"


def preflight_small(folder: Path) -> str:
    """A preflight for this project's first target, on any machine."""
    from angelforge.engines.limits import BuildOptions
    from angelforge.engines.preflight import preflight
    from angelforge.targets import get_target

    found = preflight(small_bundle(folder, Precision.FP8), get_target("h20"), BuildOptions(), lambda p, s: None)
    return f"{found.plugins} plugins, {found.engine_bytes / 1e6:.2f} MB, {found.seconds:.1f} s in {found.library}"


STEPS: Mapping[str, Callable[[Path], str]] = {
    "preflight": preflight_small,
    "aot-bf16": lambda folder: engine(folder, Precision.BF16, "tensorrt", "aot"),
    "aot-without-python": without_python,
    "aot-fp8": lambda folder: engine(folder, Precision.FP8, "tensorrt", "aot"),
    "python-bf16": lambda folder: engine(folder, Precision.BF16, "tensorrt", "python"),
    "python-fp8": lambda folder: engine(folder, Precision.FP8, "tensorrt", "python"),
    "large-tensor": large_tensor,
    "runtime": lambda folder: runtime(folder, "tensorrt", "aot"),
    "sampling": lambda folder: sampling(),
    "rtx-bf16": lambda folder: engine(folder, Precision.BF16, "tensorrt-rtx", "python"),
    "rtx-runtime": lambda folder: runtime(folder, "tensorrt-rtx", "python"),
}


def main(name: str, folder: str) -> int:
    """Runs one step."""
    try:
        print(STEPS[name](Path(folder)))
    except AngelForgeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _relative(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    if not np.isfinite(found).all():
        return float("inf")
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:3]))
