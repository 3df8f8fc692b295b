"""Measures packing against a plain copy of the same bytes, side by side in one run.

Every packing runs in a fresh process (this module as a program), so that its peak memory is its own.
"""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from angelforge.atomic import write_atomic
from angelforge.checkpoint import Checkpoint
from angelforge.config import ModelConfig
from angelforge.diskerrors import explained
from angelforge.dtypes import DType
from angelforge.errors import AngelForgeError
from angelforge.exporter.layout import bundle_tensors, plan_shards
from angelforge.exporter.packer import pack
from angelforge.exporter.synthetic_config import FULL_CONFIG
from angelforge.inventory import expected_tensors
from angelforge.precision import Precision
from angelforge.tensorfile import encode_header

# AntAngelMed's layers with fewer experts and a small vocabulary: about 0.35 GB each.
_SHAPE = {**FULL_CONFIG, "num_experts": 8, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "vocab_size": 8192}
_FILES = 4
_CHUNK = 16 << 20  # bytes


@dataclass(frozen=True)
class PackingFigures:
    """One comparison: bytes of the checkpoint, GB/s (10⁹) of every round, memory in bytes."""

    nbytes: int
    copy_rates: tuple[float, ...]
    pack_rates: tuple[float, ...]
    peak_rss: int

    @property
    def ratio(self) -> float:
        """Median packing rate over median copying rate."""
        return statistics.median(self.pack_rates) / statistics.median(self.copy_rates)


def measure_packing(
    folder: Path, nbytes: int, rounds: int = 3, precision: Precision = Precision.BF16
) -> PackingFigures:
    """Makes a random BF16 checkpoint of about `nbytes` bytes below `folder`, then copies and packs it in turns.

    Copying is `shutil.copyfile` and a sync of every file; packing is `pack`, which syncs too. Both rates are of the
    checkpoint's bytes. With precision bf16 nothing but the router is converted, with fp8 nearly all is quantised. Needs
    twice the space; everything is removed at the end. Raises AngelForgeError when the disk refuses or packing fails.
    """
    with explained("create", folder):
        folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix="measure-packing-") as scratch:
        source, target = Path(scratch, "checkpoint"), Path(scratch, "target")
        size = _write_random_checkpoint(source, nbytes)
        copies, packs, peaks = [], [], []
        for _ in range(rounds):
            copies.append(size / _timed_copy(source, target) / 1e9)
            shutil.rmtree(target)
            seconds, peak = _pack_in_process(source, target, precision)
            packs.append(size / seconds / 1e9)
            peaks.append(peak)
            shutil.rmtree(target)
    return PackingFigures(size, tuple(copies), tuple(packs), max(peaks))


def peak_memory() -> int:
    """Peak resident memory of this process in bytes.

    From /proc where there is one: getrusage counts the parent's memory at the time of the fork as well.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _write_random_checkpoint(folder: Path, nbytes: int) -> int:
    """Writes the files of a checkpoint and returns the bytes of its weight files."""
    raw = _config(nbytes)
    tensors = {
        name: (DType.BF16, expected.shape) for name, expected in expected_tensors(ModelConfig.from_dict(raw)).items()
    }
    names = list(tensors)
    parts = [names[part * len(names) // _FILES : (part + 1) * len(names) // _FILES] for part in range(_FILES)]
    random = np.random.default_rng(0)
    with explained("write", folder):
        folder.mkdir()
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts):
        file = folder / f"model-{number + 1:05d}-of-{_FILES:05d}.safetensors"
        weight_map |= dict.fromkeys(part, file.name)
        data = sum(math.prod(tensors[name][1]) * 2 for name in part)
        with explained("write", file), file.open("wb") as out:
            out.write(encode_header([(name, *tensors[name]) for name in part], {}))
            for start in range(0, data, _CHUNK):
                out.write(_random_weights(random, min(_CHUNK, data - start)))
            os.fsync(out.fileno())
    write_atomic(folder / "config.json", json.dumps(raw))
    write_atomic(folder / "model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _random_weights(random: np.random.Generator, nbytes: int) -> memoryview:
    """BF16 between 2^-15 and 2^-7, of either sign."""
    bits = np.frombuffer(random.bytes(nbytes), np.uint16) & np.uint16(0x83FF)
    np.bitwise_or(bits, np.uint16(0x3800), out=bits)
    return bits.data


def _config(nbytes: int) -> Mapping[str, Any]:
    """As many layers as `nbytes` hold."""
    sizes = [_bytes_of({**_SHAPE, "num_hidden_layers": layers}) for layers in (2, 3)]
    layers = 2 + round((nbytes - sizes[0]) / (sizes[1] - sizes[0]))
    return {**_SHAPE, "num_hidden_layers": max(2, layers)}


def _bytes_of(raw: Mapping[str, Any]) -> int:
    return sum(math.prod(expected.shape) * 2 for expected in expected_tensors(ModelConfig.from_dict(raw)).values())


def _timed_copy(source: Path, target: Path) -> float:
    start = time.perf_counter()
    with explained("write", target):
        target.mkdir()
        for file in sorted(source.glob("*.safetensors")):
            shutil.copyfile(file, target / file.name)
            with (target / file.name).open("rb+") as copied:
                os.fsync(copied.fileno())
    return time.perf_counter() - start


def _pack_in_process(source: Path, target: Path, precision: Precision) -> tuple[float, int]:
    command = [sys.executable, "-m", __name__, str(source), str(target), precision.value]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise AngelForgeError(f"Packing failed: {ended.stderr.strip().splitlines()[-1:]}. See what the disk reports.")
    seconds, peak = json.loads(ended.stdout)
    return float(seconds), int(peak)


def _main(source: str, target: str, precision: str) -> None:
    """Packs, and prints seconds and peak memory."""
    checkpoint = Checkpoint.open(source)
    shards = plan_shards(bundle_tensors(checkpoint.config, Precision(precision), checkpoint.config.max_context))
    start = time.perf_counter()
    pack(checkpoint, shards, Path(target))
    print(json.dumps([time.perf_counter() - start, peak_memory()]))


if __name__ == "__main__":
    _main(*sys.argv[1:4])
