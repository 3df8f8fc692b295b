"""What a machine lacks to run a TensorRT engine is told all at once, before anything is loaded."""

from typing import Any

import pytest
from support.tensorrt import graph_bundle, quiet, rtx

from angelforge.engines.build import build_tensorrt
from angelforge.engines.limits import BuildOptions
from angelforge.engines.manifest import engine_folder
from angelforge.errors import AngelForgeError
from angelforge.plugins.registry import OPERATORS
from angelforge.plugins.tensorrt.adapter import register
from angelforge.plugins.tensorrt.gpu import GpuFacts, find_gpu
from angelforge.plugins.tensorrt.library import Library
from angelforge.runtime import tensorrt_loading
from angelforge.runtime.tensorrt_loading import require_machine
from angelforge.runtime.tensorrt_session import TensorrtSession
from angelforge.targets import get_target

GPU = GpuFacts("NVIDIA H20", "sm_90", 78, 102_600_000_000, "580.65.06")
LIBRARY = Library("tensorrt", None, "11.4.0")
PACKAGES = ["torch", "triton"]
PARTS = {"no NVIDIA GPU", "TensorRT is not installed", "torch is not installed", "triton is not installed"}


def machine(monkeypatch: pytest.MonkeyPatch, gpu: bool, tensorrt: bool, *packages: str) -> None:
    def load(flavour: str) -> Library:
        if not tensorrt:
            raise AngelForgeError("TensorRT is not installed; install TensorRT 11 (docs/first-run.md).")
        return LIBRARY

    def spec(name: str) -> Any:
        return object() if name in packages else None

    monkeypatch.setattr(tensorrt_loading, "find_gpu", lambda index: GPU if gpu and index == 0 else None)
    monkeypatch.setattr(tensorrt_loading, "load_library", load)
    monkeypatch.setattr(tensorrt_loading, "find_spec", spec)


def test_nothing_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, True, True, *PACKAGES)
    found = require_machine(get_target("h20"))
    assert (found.gpu, found.library) == (GPU, LIBRARY)


@pytest.mark.parametrize(
    ("gpu", "tensorrt", "packages", "told"),
    [
        (False, True, PACKAGES, ["no NVIDIA GPU with a working driver"]),
        (True, False, PACKAGES, ["TensorRT is not installed; install TensorRT 11 (docs/first-run.md)"]),
        (True, True, ["triton"], ["torch is not installed; pip install 'angelforge[torch]'"]),
        (True, True, ["torch"], ["triton is not installed; pip install 'angelforge[triton]'"]),
        (False, False, [], sorted(PARTS)),
    ],
)
def test_everything_that_is_missing_is_told(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, tensorrt: bool, packages: list[str], told: list[str]
) -> None:
    machine(monkeypatch, gpu, tensorrt, *packages)
    with pytest.raises(AngelForgeError) as caught:
        require_machine(get_target("h20"))
    said = str(caught.value)
    assert said.startswith("Target h20 cannot run on this machine: ")
    assert said.endswith("angelforge doctor says more; target cpu runs anywhere.")
    assert all(text in said for text in told)
    assert sum(text in said for text in PARTS) == len(told)


def test_a_second_gpu_is_looked_for_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, True, True, *PACKAGES)
    with pytest.raises(AngelForgeError, match="no NVIDIA GPU number 1 with"):
        require_machine(get_target("h20"), 1)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A real engine of TensorRT for RTX."""
    library = rtx()
    bundle = graph_bundle(tmp_path_factory.mktemp("plan"), num_hidden_layers=2)
    built = build_tensorrt(bundle, get_target("rtx4090"), BuildOptions(max_tokens=8, max_batch=2), quiet)
    register(library, OPERATORS.values())
    return (engine_folder(bundle, "rtx4090") / built.engine).read_bytes()


def test_a_damaged_plan_is_told_in_tensorrts_words(plan: bytes) -> None:
    with pytest.raises(AngelForgeError, match=r"^TensorRT for RTX [\d.]+ cannot load the engine: .*blobSize failed\.$"):
        TensorrtSession(rtx(), plan[:1000])


@pytest.mark.skipif(find_gpu() is not None, reason="this machine has a GPU")
def test_without_a_gpu_the_driver_is_named(plan: bytes) -> None:
    """Making a runtime needs none, deserialising does."""
    with pytest.raises(AngelForgeError, match=r"cannot load the engine\. The NVIDIA driver does not work"):
        TensorrtSession(rtx(), plan)
