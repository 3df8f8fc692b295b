"""Where ONNX Runtime computes: its providers in the order they are asked, and the device that holds the pools."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnxruntime

from angelforge.engines.onnxruntime_graph import ONNXRUNTIME_ERRORS
from angelforge.errors import AngelForgeError
from angelforge.plugins.tensorrt.gpu import GpuFacts, find_gpu
from angelforge.targets import Target

Provider = tuple[str, dict[str, str]]

_WARNINGS, _ERRORS = 2, 3  # severities of its log; the first is its default

CPU: Provider = ("CPUExecutionProvider", {})
# TF32 would change routing. By default the provider's memory grows to the next power of two.
CUDA: Provider = ("CUDAExecutionProvider", {"use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"})


@dataclass(frozen=True)
class OrtDevice:
    """What a session runs on."""

    providers: tuple[Provider, ...]
    name: str  # of the memory, as OrtValues have it: "cpu" or "cuda"
    memory_bytes: int | None = None  # of a GPU


CPU_DEVICE = OrtDevice((CPU,), "cpu")


def open_device(target: Target) -> OrtDevice:
    """The device of a target that ONNX Runtime runs; raises AngelForgeError where it needs a GPU and there is none."""
    if target.device == "cpu":
        return CPU_DEVICE
    return OrtDevice((CUDA, CPU), "cuda", _require_cuda().memory_bytes)


def cuda_providers() -> list[Provider]:
    """CUDA, then the CPU for what it lacks.

    Raises:
        AngelForgeError: there is no GPU, or this ONNX Runtime has no CUDA provider.
    """
    _require_cuda()
    return [CUDA, CPU]


def open_session(
    graph: bytes, options: onnxruntime.SessionOptions, providers: Sequence[Provider], what: str = "the engine"
) -> onnxruntime.InferenceSession:
    """A session on exactly these providers; errors call the graph `what`.

    Raises:
        AngelForgeError: ONNX Runtime refuses the graph, or cannot start one of the providers; by itself it would go on
            without it.
    """
    version = onnxruntime.__version__
    # CUDA's provider warns of every ScatterND, beside the session's own log; no two tokens but padding share a slot.
    onnxruntime.set_default_logger_severity(_ERRORS)
    try:
        session = onnxruntime.InferenceSession(graph, options, providers=list(providers), enable_fallback=0)
    except ONNXRUNTIME_ERRORS as error:
        raise AngelForgeError(f"ONNX Runtime {version} cannot load {what}: {error}") from error
    finally:
        onnxruntime.set_default_logger_severity(_WARNINGS)
    started = session.get_providers()
    for name, _ in providers:
        if name not in started:
            raise AngelForgeError(
                f"ONNX Runtime {version} cannot start its {name}: a library of CUDA or cuDNN is missing or does not "
                "fit, which its own lines above name. Install it where the loader looks (LD_LIBRARY_PATH)."
            )
    return session


def _require_cuda() -> GpuFacts:
    gpu = find_gpu()
    if gpu is None:
        raise AngelForgeError(
            "The engine cuda needs an NVIDIA GPU with a working driver, and there is none (angelforge doctor). "
            "The engine cpu runs anywhere."
        )
    if CUDA[0] not in onnxruntime.get_available_providers():
        raise AngelForgeError(
            f"ONNX Runtime {onnxruntime.__version__} has no CUDA provider here: pip install onnxruntime-gpu."
        )
    return gpu
