"""Builds a serialized engine: one code path for TensorRT 11 and TensorRT for RTX but for what truly differs."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import onnx_ir as ir

from angelforge.atomic import write_atomic
from angelforge.engines.kernel_checks import compile_kernels
from angelforge.engines.profiles import Profile
from angelforge.engines.tensorrt_errors import describe_nodes, explain_build_errors
from angelforge.engines.tensorrt_log import recording
from angelforge.engines.tensorrt_parse import ParsedNetwork, parse_network
from angelforge.engines.tensorrt_progress import Report, make_monitor, part
from angelforge.errors import AngelForgeError
from angelforge.plugins.kernel import Gpu
from angelforge.plugins.operator import DOMAIN
from angelforge.plugins.registry import OPERATORS
from angelforge.plugins.tensorrt.adapter import register
from angelforge.plugins.tensorrt.aot import register_ahead_of_time
from angelforge.plugins.tensorrt.fetched import kernels_of
from angelforge.plugins.tensorrt.library import Library

_POLL = 0.1  # seconds between looks at Ctrl-C
_COMPILING = 0.3  # share of the time of a build that compiles kernels first


@dataclass(frozen=True)
class EngineRequest:
    """What is to be built. `timing_cache` is a file that is read and written beside the engine (TensorRT 11 only)."""

    library: Library
    architecture: str  # "sm_90"
    profiles: Sequence[Profile]
    ahead_of_time: Gpu | None = None  # plugins as PTX for this GPU (TensorRT 11); None: plugins in Python
    optimization_level: int | None = None  # 0 to 5, None: TensorRT's default
    timing_cache: Path | None = None


def build_engine(model: ir.Model, request: EngineRequest, log_file: Path, report: Report) -> bytes:
    """The engine of `model`, a graph as `prepare_network` leaves it. All that TensorRT says goes to `log_file`.

    Raises:
        AngelForgeError: TensorRT refuses the graph, gives the build up, or mixes up the kernels of profiles.
        KeyboardInterrupt: Ctrl-C; TensorRT has ended its work by then.
    """
    flags = _register_plugins(model, request)
    kernels_of(request.library).forget()
    if request.ahead_of_time is not None:
        compile_kernels(model, request.profiles, request.ahead_of_time, part(report, 0.0, _COMPILING))
        report = part(report, _COMPILING, 1 - _COMPILING)
    with recording(request.library, log_file) as log:
        parsed = parse_network(request.library, model, flags)
        cancel = Event()
        config = _configure(parsed, request)
        monitor = make_monitor(request.library, report, cancel)
        config.progress_monitor = monitor
        with _timing_cache(config, request):
            engine = _run(lambda: parsed.builder.build_serialized_network(parsed.network, config), cancel)
        if engine is None:
            raise AngelForgeError(
                explain_build_errors(request.library.title, log.errors, describe_nodes(model), log_file)
            )
        kernels_of(request.library).require_fetched()
        return bytes(engine)


def _register_plugins(model: ir.Model, request: EngineRequest) -> int:
    """Registers what the graph needs; returns the flags that its network is to be created with."""
    if request.ahead_of_time is None:
        register(request.library, OPERATORS.values())
        return 0
    for node in model.graph:
        node.attributes.pop("plugin_version", None)  # NVIDIA's classes know version 1 only
    used = {node.op_type for node in model.graph if node.domain == DOMAIN}
    register_ahead_of_time(request.library, [OPERATORS[name] for name in sorted(used)], request.ahead_of_time)
    return 1 << int(request.library.api.NetworkDefinitionCreationFlag.PREFER_AOT_PYTHON_PLUGINS)


def _configure(parsed: ParsedNetwork, request: EngineRequest) -> Any:
    api = request.library.api
    config = parsed.builder.create_builder_config()
    config.clear_flag(api.BuilderFlag.TF32)  # on by default; it would change routing
    config.set_preview_feature(api.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)  # the pool is written in place
    config.profiling_verbosity = api.ProfilingVerbosity.DETAILED  # for the engine inspector
    if request.optimization_level is not None:
        config.builder_optimization_level = request.optimization_level
    if request.library.flavour == "tensorrt-rtx":  # builds for a named architecture; TensorRT 11 for the GPU at hand
        config.num_compute_capabilities = 1
        config.set_compute_capability(_compute_capability(request), 0)
        config.set_flag(api.BuilderFlag.REQUIRE_USER_ALLOCATION)  # else steps may allocate, which cannot be captured
    for profile in request.profiles:
        _add_profile(parsed, config, profile)
    return config


def _compute_capability(request: EngineRequest) -> Any:
    known = request.library.api.ComputeCapability.__members__
    name = request.architecture.replace("sm_", "SM")
    if name not in known:
        able = ", ".join(other.replace("SM", "sm_") for other in known if other.startswith("SM"))
        raise AngelForgeError(f"{request.library.title} builds for {able}, not for {request.architecture}.")
    return known[name]


def _add_profile(parsed: ParsedNetwork, config: Any, profile: Profile) -> None:
    ranges = profile.symbols()
    added = parsed.builder.create_optimization_profile()
    for i in range(parsed.network.num_inputs):
        tensor = parsed.network.get_input(i)
        sizes = [
            (ranges[tensor.get_dimension_name(axis)] if size < 0 else None, size)
            for axis, size in enumerate(tensor.shape)
        ]
        if all(known is None for known, _ in sizes):
            continue
        added.set_shape(
            tensor.name,
            tuple(known.least if known else size for known, size in sizes),
            tuple(known.tuned if known else size for known, size in sizes),
            tuple(known.most if known else size for known, size in sizes),
        )
    if config.add_optimization_profile(added) < 0:
        raise AngelForgeError(f"TensorRT refuses the profile {profile.name}; please report this with your options.")


@contextmanager
def _timing_cache(config: Any, request: EngineRequest) -> Iterator[None]:
    """Lets TensorRT 11 reuse what it measured in earlier builds on this GPU, and keeps what it measures now."""
    file = request.timing_cache
    if file is None or request.library.flavour != "tensorrt":
        yield
        return
    cache = config.create_timing_cache(file.read_bytes() if file.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, False):  # of another version or GPU
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    yield
    write_atomic(file, bytes(cache.serialize()))


def _run(work: Callable[[], Any], cancel: Event) -> Any:
    """Calls `work` in a thread of its own, so that this one sees Ctrl-C, which TensorRT would not let through."""
    with ThreadPoolExecutor(1, "tensorrt-build") as pool:  # leaving it waits for the thread
        future = pool.submit(work)
        try:
            while not wait([future], timeout=_POLL).done:
                pass
        except KeyboardInterrupt:
            cancel.set()
            raise
        return future.result()
