"""`doctor` tells gaps apart from what is needed, and says for each what it prevents and how to close it."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from angelforge.machine import Gpu, Memory
from angelforge.tools import checks_hardware as hardware
from angelforge.tools import checks_software as software
from angelforge.tools.cli import main
from angelforge.tools.finding import Finding, installed, probe, requirements

GB = 10**9


def test_this_machine() -> None:
    """Here, where the tests run, the main job is possible; every gap says what it prevents and how to close it."""
    result = CliRunner().invoke(main, ["doctor", "--json"])
    report = json.loads(result.stdout)
    assert result.exit_code == 0
    assert report["main_job_possible"]
    findings = {finding["name"]: Finding(**finding) for finding in report["findings"]}
    assert {"Python", "numpy", "onnx", "GPU", "TensorRT", "TensorRT-RTX", "torch", "triton", "memory"} <= set(findings)
    assert "CPUExecutionProvider" in findings["ONNX Runtime runs a graph"].found
    for finding in findings.values():
        assert finding.found
        assert (finding.status == "ok") or (finding.prevents and finding.fix)


def test_text_says_the_same() -> None:
    """Without --json: a line a finding, its gaps below it, the answer last."""
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 0
    assert "ok       Python" in result.stdout
    assert result.stdout.count("prevents: ") == result.stdout.count("fix: ")
    assert result.stdout.endswith("on this machine: possible\n")


def test_missing_package_ends_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that the main job needs is named with the command that installs it; the exit code is 1."""
    monkeypatch.setattr(software, "installed", lambda name: None if name == "onnx" else installed(name))
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 1
    assert "-m pip install 'onnx<1.24,>=1.20'" in result.stdout
    assert "not possible" in result.stdout
    assert result.stderr == ""


def test_package_outside_the_tested_versions_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """A version that was not tested is told, but it does not make the job impossible."""
    monkeypatch.setattr(software, "installed", lambda name: "99.0" if name == "rich" else installed(name))
    findings = {finding.name: finding for finding in software.check_packages()}
    assert findings["rich"].status == "problem"
    assert findings["rich"].found == "99.0, wanted <16,>=13"
    assert not findings["rich"].needed
    assert findings["click"].status == "ok"


def test_two_onnxruntimes_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime and onnxruntime-gpu overwrite each other's files."""
    monkeypatch.setattr(software, "installed", {"onnxruntime": "1.31.0", "onnxruntime-gpu": "1.31.0"}.get)
    assert software.check_one_onnxruntime().status == "problem"
    monkeypatch.setattr(software, "installed", {"onnxruntime": "1.31.0"}.get)
    assert software.check_one_onnxruntime().status == "ok"


def test_onnxruntime_that_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed is not enough: a graph must run, and a crash of the library cannot harm doctor."""
    monkeypatch.setattr(software, "_RUN_A_GRAPH", "import os; os.abort()")
    finding = software.check_onnxruntime()
    assert (finding.status, finding.needed) == ("problem", True)
    monkeypatch.setattr(software, "installed", lambda name: None)
    assert software.check_onnxruntime().status == "missing"


def test_library_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bindings whose shared library is absent are a problem, told in the loader's words."""
    monkeypatch.setattr(software, "installed", lambda name: "11.4")
    monkeypatch.setattr(software, "probe", lambda code: (False, "ImportError: libnvinfer.so.11: cannot open"))
    assert software.check_tensorrt().found == "ImportError: libnvinfer.so.11: cannot open"
    assert software.check_tensorrt().status == "problem"
    monkeypatch.setattr(software, "probe", lambda code: (True, "11.4.0"))
    assert software.check_tensorrt() == Finding("TensorRT", "ok", "11.4.0")


def test_probe() -> None:
    """A probe returns the last line, of the output or of the failure, and ends what does not end by itself."""
    assert probe("print('a'); print('b')") == (True, "b")
    assert probe("raise RuntimeError('broken')") == (False, "RuntimeError: broken")
    assert probe("import os; os._exit(7)") == (False, "ended with code 7")
    assert probe("import time; time.sleep(60)", seconds=0.5) == (False, "no answer within 0 s")


def test_requirements_are_those_of_this_machine() -> None:
    """Exactly one ONNX Runtime is asked for; extras are asked for by name only."""
    names = [item.name for item in requirements()]
    assert len([name for name in names if name.startswith("onnxruntime")]) == 1
    assert "torch" not in names
    assert [item.name for item in requirements("torch")] == ["torch"]


@pytest.mark.parametrize(
    ("available", "status", "needed"), [(GB // 2, "problem", True), (50 * GB, "missing", False), (200 * GB, "ok", True)]
)
def test_memory(available: int, status: str, needed: bool) -> None:
    """Under 1 GB nothing works; under the model's size the whole model does not; above it all is well."""
    finding = hardware.check_memory(Memory(256 * GB, available))
    assert (finding.status, finding.needed) == (status, needed)


def test_memory_that_is_not_told() -> None:
    assert hardware.check_memory(None).status == "problem"


@pytest.mark.parametrize(
    ("free", "status", "named"),
    [(GB // 2, "problem", ""), (50 * GB, "missing", "FP8 (104 GB) or BF16 (206 GB)"), (150 * GB, "missing", "in BF16")],
)
def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, status: str, named: str) -> None:
    """The free space is held against the bundles of AntAngelMed."""
    monkeypatch.setattr(hardware.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    finding = hardware.check_disk(tmp_path)
    assert finding.status == status
    assert named in finding.prevents
    assert str(tmp_path) in finding.found


def test_gpu_and_driver() -> None:
    """Cards are named with memory and capability; a driver older than CUDA 13 is a problem, told once."""
    old, new = Gpu("NVIDIA H20", "550.54", 97871 * 2**20, "9.0"), Gpu("NVIDIA H20", "580.65.06")
    assert hardware.check_gpu([old]).found == "NVIDIA H20, 103 GB, compute capability 9.0"
    assert [finding.status for finding in hardware.check_driver([old, old])] == ["problem"]
    assert [finding.status for finding in hardware.check_driver([new])] == ["ok"]
    assert hardware.check_gpu([]).status == "missing"
    assert hardware.check_driver([]) == []


def test_folder_that_is_not_there() -> None:
    assert CliRunner().invoke(main, ["doctor", "--folder", "not/there"]).exit_code == 2
