"""The real model's shape, and memory: long tests."""

import json
import subprocess
import sys
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

_PEAK = "import resource, subprocess, sys; code = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL); "
_PEAK += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024); sys.exit(code)"


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


@pytest.mark.full
def test_memory_of_single_layers(tmp_path: Path) -> None:
    """At most one layer in f32 and 1 GB: 64 experts of 2048 × 512, of 4 layers."""
    sizes = {"hidden_size": 2048, "num_experts": 64, "moe_intermediate_size": 512, "num_attention_heads": 16}
    config = small_config(**sizes, head_dim=128, num_key_value_heads=4, n_group=8, topk_group=4, num_experts_per_tok=8)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", config)
    command = [sys.executable, "-m", "angelforge.tools", "validate", str(checkpoint), "--layers", "1,3"]
    result = subprocess.run([sys.executable, "-c", _PEAK, *command], capture_output=True, text=True, check=True)
    layer = 4 * (65 * 3 * 2048 * 512 + 2048 * (16 + 2 * 4) * 128 + 2048 * 2048)
    assert int(result.stdout) <= layer + 10**9
