"""What `doctor` looks at in hardware: GPU and driver, memory, disk, cores."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from angelforge.machine import Gpu, Memory
from angelforge.tools.checks_software import MAIN_JOB
from angelforge.tools.finding import Finding
from angelforge.tools.output import format_bytes

FP8_BYTES, BF16_BYTES = 104_200_000_000, 205_800_000_000  # the weights of AntAngelMed
LEAST_BYTES = 1_000_000_000  # of memory (the packer's bound) and of disk (the demo and some room)
DRIVER = 580  # the first driver branch for CUDA 13, which TensorRT 11 and TensorRT-RTX are built with


def check_gpu(gpus: Sequence[Gpu]) -> Finding:
    """NVIDIA GPUs with their memory and compute capability."""
    if gpus:
        return Finding("GPU", "ok", "; ".join(_describe(gpu) for gpu in gpus))
    fix = "Use a machine with an NVIDIA GPU; in a container, start it with its GPUs (docker run --gpus all)."
    return Finding("GPU", "missing", "none found", "running TensorRT engines and target cuda, measuring kernels", fix)


def check_driver(gpus: Sequence[Gpu]) -> list[Finding]:
    """Where there is a GPU: the NVIDIA driver, new enough for CUDA 13."""
    findings = []
    for found in sorted({gpu.driver for gpu in gpus}):
        major = found.partition(".")[0]
        if major.isdigit() and int(major) < DRIVER:
            fix = f"Install driver {DRIVER} or newer."
            findings.append(Finding("NVIDIA driver", "problem", found, "TensorRT 11 and TensorRT-RTX (CUDA 13)", fix))
        else:
            findings.append(Finding("NVIDIA driver", "ok", found))
    return findings


def check_memory(memory: Memory | None) -> Finding:
    """Free memory against what the packer needs, and against the weights of AntAngelMed."""
    if memory is None:
        fix = "On Linux, mount /proc; on other systems look yourself."
        return Finding("memory", "problem", "this system does not tell", "knowing whether a model fits", fix)
    found = f"{format_bytes(memory.available)} free of {format_bytes(memory.total)}"
    if memory.available < LEAST_BYTES:
        fix = "End other programs, or raise the container's memory limit."
        return Finding("memory", "problem", found, MAIN_JOB, fix, needed=True)
    if memory.available < FP8_BYTES:
        prevents = f"keeping the weights of AntAngelMed in main memory ({format_bytes(FP8_BYTES)} in FP8)"
        fix = "Nothing is needed for export, build or small models; take a bigger machine to run the whole model."
        return Finding("memory", "missing", found, prevents, fix)
    return Finding("memory", "ok", found, needed=True)


def check_disk(folder: Path) -> Finding:
    """Free space where bundles would be written, against the sizes of AntAngelMed's bundles."""
    free = shutil.disk_usage(folder).free
    found = f"{format_bytes(free)} free at {folder.resolve()}"
    if free < LEAST_BYTES:
        return Finding("disk", "problem", found, MAIN_JOB, "Free some space, or name another --folder.", needed=True)
    short = [
        f"{name} ({format_bytes(size)})" for name, size in (("FP8", FP8_BYTES), ("BF16", BF16_BYTES)) if free < size
    ]
    if short:
        prevents = f"writing a bundle of AntAngelMed in {' or '.join(short)} here"
        return Finding("disk", "missing", found, prevents, "Free some space, or name another disk with --folder.")
    return Finding("disk", "ok", found, needed=True)


def check_cores(count: int) -> Finding:
    """Processor cores that this process may use."""
    return Finding("cores", "ok", str(count))


def _describe(gpu: Gpu) -> str:
    size = f", {format_bytes(gpu.memory)}" if gpu.memory else ""
    capability = f", compute capability {gpu.compute_capability}" if gpu.compute_capability else ""
    return f"{gpu.name}{size}{capability}"
