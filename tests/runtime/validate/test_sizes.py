"""The real model's shape, and memory: long tests."""

import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import pytest

from angelforge.engines.cpu import build_cpu, engine_folder
from angelforge.exporter.export import ExportOptions, export
from angelforge.exporter.synthetic import small_config, write_checkpoint
from angelforge.exporter.synthetic_config import FULL_CONFIG
from angelforge.precision import Precision
from angelforge.runtime.validate.engine_graph import EngineGraph
from angelforge.runtime.validate.operations import judge_graph


@pytest.mark.full
@pytest.mark.parametrize("precision", [Precision.BF16, Precision.FP8])
def test_every_operator_of_the_real_graph_is_seen_by_itself(tmp_path: Path, precision: Precision) -> None:
    """Of 32 layers, in the engine's own file: every value at an operator's border has a name."""
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint/config.json").write_text(json.dumps(FULL_CONFIG))
    options = ExportOptions(precision=precision, graph_only=True)
    bundle = export(str(tmp_path / "checkpoint"), tmp_path / "bundle", options)
    built = build_cpu(bundle)
    judge = judge_graph(bundle)
    engine = EngineGraph(ir.load(engine_folder(bundle, "cpu") / built.engine), bundle.folder, judge)
    borders = {name for o in judge.operations for name in o.outputs if not name.endswith("partial_start")}
    assert borders - engine.names() == set()


@dataclass(frozen=True)
class Peak:
    """Of a process, bytes."""

    anonymous: int  # what it cannot give back: weights that are mapped from files do not count
    resident: int


def peak_of(*arguments: str) -> Peak:
    """Runs `angelforge validate` and watches it."""
    command = [sys.executable, "-m", "angelforge.tools", "validate", *arguments]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        anonymous = resident = 0
        while process.poll() is None:
            told = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
            sizes = {m[1]: int(m[2]) * 1024 for m in re.finditer(r"^(\w+):\s+(\d+) kB", told, re.MULTILINE)}
            anonymous = max(anonymous, sizes.get("RssAnon", 0) + sizes.get("RssShmem", 0))
            resident = max(resident, sizes.get("VmHWM", 0))
            time.sleep(0.02)
        assert process.stderr is not None
        assert process.returncode == 0, process.stderr.read()
    return Peak(anonymous, resident)


@pytest.fixture(scope="module")
def middling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 64 experts of 2048 × 512, 3 layers."""
    sizes = {"hidden_size": 2048, "num_experts": 64, "moe_intermediate_size": 512, "num_attention_heads": 16}
    sizes |= {"head_dim": 128, "num_key_value_heads": 4, "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8}
    return write_checkpoint(
        tmp_path_factory.mktemp("middling") / "checkpoint", small_config(**sizes, num_hidden_layers=3)
    )


LAYER = 4 * (65 * 3 * 2048 * 512 + 2048 * (16 + 2 * 4) * 128 + 2048 * 2048)  # of it, in f32
FEW = ("--random", "1", "--length", "30")


@pytest.mark.full
def test_memory_of_single_layers(middling: Path) -> None:
    """At most one layer in f32 and 1 GB, mapped files included."""
    assert peak_of(str(middling), "--layers", "1,2").resident <= LAYER + 10**9


@pytest.mark.full
@pytest.mark.parametrize("precision", [Precision.BF16, Precision.FP8])
def test_memory_of_bundles(middling: Path, tmp_path: Path, precision: Precision) -> None:
    """Whatever is compared, less than one layer in f32 is held beside mapped weights; of a study half of one."""
    bundle = export(str(middling), tmp_path / "bundle", ExportOptions(precision=precision))
    build_cpu(bundle)
    for mode in ("--layer-by-layer", "--operator-by-operator"):
        assert peak_of(str(bundle.folder), mode, *FEW).anonymous <= LAYER
    assert peak_of(str(bundle.folder), "--against", "fp32", *FEW).anonymous <= LAYER / 2
