"""`doctor --deep`: tries out on this machine what could not be tried where the project was written."""

import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

from angelforge import machine
from angelforge.tools.finding import Finding, installed

SECONDS = 900.0  # a step may take; TensorRT measures while it builds

# Step of deep_steps: what it shows, what its failure prevents, what to do then.
_QUESTIONS = {
    "preflight": (
        "TensorRT for RTX builds a preflight",
        "checking bundles without a GPU",
        "pip install '.[rtx]' in the project's folder",
    ),
    "aot-bf16": (
        "TensorRT 11, ahead-of-time plugins, bf16",
        "engines that need no Python",
        "Build with --plugins python, and send this report.",
    ),
    "aot-without-python": (
        "such an engine loads without this project",
        "trtexec --loadEngine",
        "Send this report.",
    ),
    "aot-fp8": (
        "TensorRT 11, ahead-of-time plugins, fp8",
        "FP8 engines that need no Python",
        "Build with --plugins python, and send this report.",
    ),
    "python-bf16": ("TensorRT 11, plugins in Python, bf16", "running this project on TensorRT 11", "Send this report."),
    "python-fp8": ("TensorRT 11, plugins in Python, fp8", "running FP8 models on TensorRT 11", "Send this report."),
    "large-tensor": ("a tensor of 2³¹ elements", "nothing: this project makes none", "Send this report."),
    "runtime": (
        "run and serve with TensorRT 11, captured steps",
        "angelforge run and serve on this GPU",
        "Send this report.",
    ),
    "sampling": ("sampling on the GPU", "fast sampling on this GPU", "Send this report."),
    "rtx-bf16": (
        "TensorRT for RTX on this GPU, bf16",
        "engines of TensorRT for RTX on this GPU",
        "On Hopper this is expected; use TensorRT 11 there.",
    ),
    "rtx-runtime": (
        "run and serve with TensorRT for RTX, captured steps",
        "angelforge run and serve on this GPU",
        "On Hopper this is expected; use TensorRT 11 there.",
    ),
}
_WITHOUT_GPU = {"preflight"}
_RTX = "tensorrt-rtx-cu13-bindings"
_NEEDS = {"preflight": _RTX, "rtx-bf16": _RTX, "rtx-runtime": _RTX, "sampling": "triton"}


def examine_deeply(tell: Callable[[str], None], seconds: float = SECONDS) -> Iterable[Finding]:
    """Every step in turn, in a process of its own; `tell` gets the name of what begins. Needs minutes on a GPU."""
    gpu = bool(machine.gpus())
    with TemporaryDirectory(prefix="angelforge-deep-") as folder:
        for step, (name, prevents, fix) in _QUESTIONS.items():
            library = _NEEDS.get(step, "tensorrt")
            if not gpu and step not in _WITHOUT_GPU:
                yield Finding(
                    name, "missing", "not tried: needs an NVIDIA GPU", prevents, "Run this on the GPU's machine."
                )
            elif installed(library) is None:
                yield Finding(
                    name, "missing", f"not tried: {library} is not installed", prevents, "See docs/first-run.md."
                )
            else:
                tell(name)
                worked, said = run_step(step, Path(folder), seconds)
                yield Finding(name, "ok", said) if worked else Finding(name, "problem", said, prevents, fix)


def run_step(step: str, folder: Path, seconds: float) -> tuple[bool, str]:
    """Whether a step succeeded, and what it said; a crash or no answer in time is a failure that is told."""
    begin = perf_counter()
    command = [sys.executable, "-m", "angelforge.tools.deep_steps", step, str(folder)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return False, f"no answer within {seconds:.0f} s"
    lines = [line for line in (result.stderr if result.returncode else result.stdout).splitlines() if line.strip()]
    said = lines[-1].strip() if lines else "said nothing"
    if result.returncode < 0:
        said = f"ended by signal {-result.returncode}; last words: {said}"
    return result.returncode == 0, f"{said} [{perf_counter() - begin:.0f} s]"
