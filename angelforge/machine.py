"""What the machine has: memory and cores a process may really use (control groups counted), and its GPUs."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SYSTEM = Path("/")


@dataclass(frozen=True)
class Memory:
    """Bytes of main memory: what this process may use at most, and what of it is free now."""

    total: int
    available: int


@dataclass(frozen=True)
class Gpu:
    """A GPU as its driver reports it; memory in bytes and compute capability ("9.0") where the driver tells them."""

    name: str
    driver: str
    memory: int | None = None
    compute_capability: str | None = None


def memory(root: Path = SYSTEM) -> Memory | None:
    """Memory of the machine, or of the control group (v1 or v2) where that allows less; None where neither is told."""
    found = _machine_memory(root)
    for group in _groups(root, "memory"):
        limit = _number(group / "memory.max") or _number(group / "memory.limit_in_bytes")
        used = _number(group / "memory.current") or _number(group / "memory.usage_in_bytes")
        if limit is None or used is None:
            continue
        stat = _fields(group / "memory.stat")
        # Usage counts the page cache; inactive file pages are given back when memory is short.
        reclaimable = stat.get("total_inactive_file", stat.get("inactive_file", 0))
        free = max(limit - used + reclaimable, 0)
        found = Memory(min(found.total, limit), min(found.available, free)) if found else Memory(limit, free)
    return found


def cores(root: Path = SYSTEM) -> int:
    """Cores that this process may use: affinity, and the control group's quota rounded up."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for group in _groups(root, "cpu"):
        quota, period = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
        words = _text(group / "cpu.max").split()
        if len(words) == 2 and words[0] != "max":
            quota, period = int(words[0]), int(words[1])
        if quota and period and quota > 0:
            count = min(count, -(-quota // period))
    return max(count, 1)


def gpus(root: Path = SYSTEM) -> tuple[Gpu, ...]:
    """NVIDIA GPUs, from nvidia-smi or else from /proc/driver/nvidia; needs no CUDA library."""
    return _gpus_of_smi() or tuple(_gpus_of_proc(root))


def _gpus_of_smi() -> tuple[Gpu, ...]:
    if (smi := shutil.which("nvidia-smi")) is None:
        return ()
    query = "--query-gpu=name,driver_version,memory.total,compute_cap"
    command = [smi, query, "--format=csv,noheader,nounits"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    rows = [[cell.strip() for cell in line.split(",")] for line in result.stdout.splitlines()]
    if result.returncode != 0 or not all(len(row) == 4 for row in rows):
        return ()
    return tuple(
        Gpu(name, driver, int(mebibytes) * 2**20 if mebibytes.isdigit() else None, capability)
        for name, driver, mebibytes, capability in rows
    )


def _gpus_of_proc(root: Path) -> Iterator[Gpu]:
    folder = root / "proc/driver/nvidia"
    words = _text(folder / "version").split()
    driver = next((word for word in words if word[:1].isdigit() and "." in word), "unknown")
    for file in sorted(folder.glob("gpus/*/information")):
        names = [line.partition(":")[2].strip() for line in _text(file).splitlines() if line.startswith("Model:")]
        yield Gpu(names[0] if names else "NVIDIA GPU", driver)


def _machine_memory(root: Path) -> Memory | None:
    fields = _fields(root / "proc/meminfo")  # kB
    if "MemTotal" in fields and "MemAvailable" in fields:
        return Memory(fields["MemTotal"] * 1024, fields["MemAvailable"] * 1024)
    return None


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's control group and its parents. In a container its own group may be mounted as root."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / controllers
        own = mount / path.lstrip("/")
        yield from (folder for folder in (own, *own.parents) if folder == mount or mount in folder.parents)


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def _number(file: Path) -> int | None:
    text = _text(file).strip()
    return int(text) if text.lstrip("-").isdigit() else None


def _fields(file: Path) -> dict[str, int]:
    rows = (line.replace(":", " ").split() for line in _text(file).splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) >= 2 and row[1].isdigit()}
