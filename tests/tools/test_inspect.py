"""`inspect` tells what a file is, checks it on the way, and prints the same for people and for machines."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from angelforge.engines.cpu import build_cpu
from angelforge.exporter.export import ExportOptions, export
from angelforge.tools.cli import main
from angelforge.tools.graph_summary import Port
from angelforge.tools.inspect_graph import _rows


@pytest.fixture(scope="module")
def bundle(small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with an engine. Read only."""
    opened = export(str(small_checkpoint), tmp_path_factory.mktemp("inspect") / "bundle", ExportOptions())
    build_cpu(opened)
    return opened.folder


def inspect(*args: object) -> Result:
    return CliRunner().invoke(main, ["inspect", *map(str, args)])


def test_bundle(bundle: Path) -> None:
    """A bundle's manifest, graph and engine, in JSON."""
    report = json.loads(inspect(bundle, "--json").stdout)
    assert (report["kind"], report["verified"]) == ("bundle", False)
    assert report["manifest"] == json.loads((bundle / "angelforge.json").read_text())
    graph = report["graphs"]["target"]
    assert graph["bytes"] == (bundle / "model.onnx").stat().st_size
    assert graph["operators"]["angelforge.PagedAttention"] == 4
    assert {port["name"]: port["shape"] for port in graph["inputs"]}["query_start"] == ["B+1"]
    assert [port["dtype"] for port in graph["outputs"] if port["name"] == "logits"] == ["float"]
    assert report["engines"]["cpu"]["backend"] == "onnxruntime"


def test_bundle_for_people(bundle: Path) -> None:
    """The same as text, each file with its size, the pools of all layers in one row."""
    result = inspect(bundle)
    assert result.exit_code == 0
    assert all(text in result.stdout for text in ("weights/head.safetensors", "angelforge.MoERoute", "onnxruntime"))
    assert "kv_cache.0 … kv_cache.3" in result.stdout


def test_verify_reads_every_byte(bundle: Path, tmp_path: Path) -> None:
    """A changed byte of a weight is found by --verify and by nothing less."""
    assert json.loads(inspect(bundle, "--verify", "--json").stdout)["verified"]
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    with (copy / "weights" / "head.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    assert inspect(copy).exit_code == 0
    result = inspect(copy, "--verify")
    assert result.exit_code == 1
    assert "weights/head.safetensors" in result.stderr


def test_checkpoint(small_checkpoint: Path) -> None:
    """A checkpoint's configuration and headers."""
    report = json.loads(inspect(small_checkpoint, "--json").stdout)
    assert (report["kind"], report["tensors"]) == ("checkpoint", 189)
    assert report["config"]["num_experts"] == 16
    assert "189 tensors" in inspect(small_checkpoint).stdout


def test_safetensors_file(bundle: Path) -> None:
    """Names, types, shapes and places of the tensors of one file."""
    file = bundle / "weights" / "head.safetensors"
    report = json.loads(inspect(file, "--json").stdout)
    tensors = {tensor["name"]: tensor for tensor in report["tensors"]}
    assert (tensors["lm_head.weight"]["dtype"], tensors["lm_head.weight"]["shape"]) == ("BF16", [1024, 256])
    assert sum(tensor["bytes"] for tensor in tensors.values()) <= report["bytes"] == file.stat().st_size
    assert "1024 × 256" in inspect(file).stdout


def test_onnx_file(bundle: Path, tmp_path: Path) -> None:
    """A graph alone, wherever it is: its weights are not needed."""
    alone = Path(shutil.copy(bundle / "model.onnx", tmp_path))
    assert json.loads(inspect(alone, "--json").stdout)["kind"] == "onnx"
    assert "angelforge.Linear" in inspect(alone).stdout


@pytest.mark.parametrize("content", [b"", b"this is no graph at all", bytes(range(256))])
def test_damaged_onnx_file(tmp_path: Path, content: bytes) -> None:
    """What is no graph is told so."""
    file = tmp_path / "model.onnx"
    file.write_bytes(content)
    result = inspect(file)
    assert result.exit_code == 1
    assert "no ONNX file" in result.stderr


def test_what_is_not_there_or_nothing_known(tmp_path: Path, small_checkpoint: Path) -> None:
    """Each gets a sentence, and the exit code of its kind."""
    (tmp_path / "x.bin").write_bytes(b"x")
    assert "There is no" in inspect(tmp_path / "not there").stderr
    assert "neither a bundle" in inspect(tmp_path).stderr
    assert "neither a bundle" in inspect(tmp_path / "x.bin").stderr
    assert inspect(tmp_path).exit_code == 1
    result = inspect(small_checkpoint, "--verify")
    assert (result.exit_code, "no bundle" in result.stderr) == (2, True)


def test_numbered_ports_are_one_row() -> None:
    """Ports of one name and type up to a number are one row; another type is a row of its own."""
    pools = [Port(f"kv.{i}", "float", ("T",)) for i in range(12)]
    assert _rows("input", (Port("x", "int64", ()), *pools, Port("kv.12", "float", (1,)))) == [
        ["input", "x", "int64 []"],
        ["input", "kv.0 … kv.11", "float [T]"],
        ["input", "kv.12", "float [1]"],
    ]
