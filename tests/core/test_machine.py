"""What a process may really use of a machine, read from trees of /proc and /sys as kernels and containers show them."""

import os
import stat
from pathlib import Path

import pytest

from angelforge import machine
from angelforge.machine import Gpu, Memory

GB = 10**9


def tree(root: Path, files: dict[str, str]) -> Path:
    """Write the files of a made-up system."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = {"proc/meminfo": f"MemTotal: {16 * GB // 1024} kB\nMemFree: 5 kB\nMemAvailable: {8 * GB // 1024} kB\n"}
V2 = {"proc/self/cgroup": "0::/a/b\n"}
V1 = {"proc/self/cgroup": "9:memory:/a/b\n3:cpu,cpuacct:/a\n"}


def v2_group(path: str, limit: str, used: int, inactive: int = 0) -> dict[str, str]:
    folder = f"sys/fs/cgroup/{path}"
    stat_text = f"anon 5\ninactive_file {inactive}\n"
    return {f"{folder}memory.max": limit, f"{folder}memory.current": str(used), f"{folder}memory.stat": stat_text}


def test_memory_without_a_limit(tmp_path: Path) -> None:
    """Without control groups, and with one that sets no limit, the machine's own numbers count."""
    whole = Memory(16 * GB // 1024 * 1024, 8 * GB // 1024 * 1024)
    assert machine.memory(tree(tmp_path, MEMINFO)) == whole
    assert machine.memory(tree(tmp_path, V2 | v2_group("a/b/", "max\n", GB))) == whole


@pytest.mark.parametrize("path", ["a/b/", "a/", ""])
def test_memory_limit_of_any_level_counts(tmp_path: Path, path: str) -> None:
    """A limit of the own group, of its parent, and of the root as containers see it; page cache counts as free."""
    files = MEMINFO | V2 | v2_group(path, f"{4 * GB}\n", 3 * GB, inactive=2 * GB)
    assert machine.memory(tree(tmp_path, files)) == Memory(4 * GB, 3 * GB)


def test_memory_smallest_level_wins(tmp_path: Path) -> None:
    """With several limits the lowest total and the lowest rest count, each for itself."""
    files = MEMINFO | V2 | v2_group("a/b/", f"{6 * GB}", 2 * GB) | v2_group("a/", f"{7 * GB}", 6 * GB)
    assert machine.memory(tree(tmp_path, files)) == Memory(6 * GB, 1 * GB)


def test_memory_limit_of_version_1(tmp_path: Path) -> None:
    folder = "sys/fs/cgroup/memory/a/b/memory."
    files = {f"{folder}limit_in_bytes": f"{2 * GB}", f"{folder}usage_in_bytes": f"{3 * GB}"}
    files |= {f"{folder}stat": "cache 7\n"}
    assert machine.memory(tree(tmp_path, MEMINFO | V1 | files)) == Memory(2 * GB, 0)


def test_memory_unknown(tmp_path: Path) -> None:
    """A system without /proc does not fail; it does not tell."""
    assert machine.memory(tmp_path) is None
    assert machine.memory(tree(tmp_path, {"proc/meminfo": "nonsense\n"})) is None


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8),
        (V2 | {"sys/fs/cgroup/a/cpu.max": "max 100000\n"}, 8),
        (V2 | {"sys/fs/cgroup/a/cpu.max": "250000 100000\n"}, 3),
        (V2 | {"sys/fs/cgroup/a/b/cpu.max": "1000 100000\n"}, 1),
        (V2 | {"sys/fs/cgroup/cpu.max": "3200000 100000\n"}, 8),
        (
            V1
            | {
                "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "200000\n",
                "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "100000\n",
            },
            2,
        ),
        (
            V1
            | {
                "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "100000\n",
            },
            8,
        ),
    ],
)
def test_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], expected: int) -> None:
    """Affinity bounds the cores, and so does a quota, rounded up."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert machine.cores(tree(tmp_path, files)) == expected


def fake_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    file = folder / "bin" / "nvidia-smi"
    file.parent.mkdir()
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{file.parent}:/bin:/usr/bin")


PROC = {
    "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27\n",
    "proc/driver/nvidia/gpus/0000:01:00.0/information": "Model: \t NVIDIA H20\nIRQ: 5\n",
}


def test_gpus_of_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cards, one of which does not tell its memory."""
    rows = ("NVIDIA H200, 580.65.06, 143771, 9.0", "NVIDIA Thing, 580.65.06, [N/A], 9.0")
    fake_smi(tmp_path, monkeypatch, "\n".join(f"echo '{row}'" for row in rows))
    assert machine.gpus(tmp_path) == (
        Gpu("NVIDIA H200", "580.65.06", 143771 * 2**20, "9.0"),
        Gpu("NVIDIA Thing", "580.65.06", None, "9.0"),
    )


@pytest.mark.parametrize("script", ["exit 9", "echo 'No devices were found'", ""])
def test_gpus_of_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Where nvidia-smi fails or says nothing usable, the driver's own files are read."""
    fake_smi(tmp_path, monkeypatch, script)
    assert machine.gpus(tree(tmp_path, PROC)) == (Gpu("NVIDIA H20", "580.65.06"),)


def test_no_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.gpus(tmp_path) == ()
