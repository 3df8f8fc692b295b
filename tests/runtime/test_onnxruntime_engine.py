"""The CPU engine: the pool is updated in place, and what does not fit is refused before it is loaded."""

import time
from pathlib import Path

import numpy as np
import pytest
from support.built import Sequences, make_bundle

from angelforge.bundle import Bundle
from angelforge.errors import AngelForgeError
from angelforge.exporter.export import ExportOptions, export
from angelforge.precision import Precision
from angelforge.runtime.onnxruntime_engine import OnnxRuntimeEngine

FP32 = ExportOptions(precision=Precision.FP32)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A small built bundle."""
    return make_bundle(tmp_path_factory.mktemp("engine"), options=FP32)[1]


def test_a_step_writes_its_own_slots_and_nothing_else(bundle: Bundle) -> None:
    engine = OnnxRuntimeEngine(bundle, 6)
    addresses = [pool.ctypes.data for pool in engine.pools]
    for pool in engine.pools:
        pool[:] = 7.0
    Sequences(engine, [[4, 2]]).call([list(range(70))])
    for pool, address in zip(engine.pools, addresses, strict=True):
        assert pool.ctypes.data == address
        written = (pool != 7.0).any(axis=(1, 2, 4))  # [pages, page_size]
        assert written[4].all() and written[2, :6].all()
        assert not written[2, 6:].any() and not written[[0, 1, 3, 5]].any()


def test_a_step_does_not_copy_the_pool(bundle: Bundle) -> None:
    """Copying 1.3 GB of pool would take a large part of a second; a step of this model takes milliseconds."""
    engine = OnnxRuntimeEngine(bundle, 10_000)
    sequences = Sequences(engine, [[9_000]])
    sequences.call([[1]])
    steps = []
    for _ in range(5):
        begin = time.perf_counter()
        sequences.call([[1]])
        steps.append(time.perf_counter() - begin)
    assert min(steps) < 0.1


def test_a_bundle_without_weights_can_be_built_but_not_run(tmp_path: Path, small_checkpoint: Path) -> None:
    from angelforge.engines.cpu import build_cpu

    bundle = export(str(small_checkpoint), tmp_path / "bundle", ExportOptions(graph_only=True))
    build_cpu(bundle)
    with pytest.raises(AngelForgeError, match="no weights"):
        OnnxRuntimeEngine(bundle, 4)
    export(str(small_checkpoint), tmp_path / "bundle", ExportOptions())  # the engine stays valid
    engine = OnnxRuntimeEngine(Bundle.open(tmp_path / "bundle"), 4)
    assert np.isfinite(Sequences(engine, [[1]]).call([[5, 6]])[0]).all()


def test_a_changed_engine_is_refused(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path, options=FP32)[1]
    (engine,) = (tmp_path / "bundle" / "engines" / "cpu").glob("*.onnx")
    engine.write_bytes(engine.read_bytes()[:-1])
    with pytest.raises(AngelForgeError, match=r"not the file that was built.*angelforge build --target cpu"):
        OnnxRuntimeEngine(bundle, 4)


def test_an_engine_of_another_bundle_is_refused(tmp_path: Path) -> None:
    first = make_bundle(tmp_path / "a", options=FP32)[1]
    second = make_bundle(tmp_path / "b", {"num_hidden_layers": 2}, FP32)[1]
    target = second.folder / "engines" / "cpu"
    for file in (first.folder / "engines" / "cpu").iterdir():
        if file.is_file():
            (target / file.name).write_bytes(file.read_bytes())
    with pytest.raises(AngelForgeError, match="another model configuration"):
        OnnxRuntimeEngine(second, 4)


def test_a_bundle_that_was_not_built_says_so(tmp_path: Path, small_checkpoint: Path) -> None:
    bundle = export(str(small_checkpoint), tmp_path / "bundle", ExportOptions())
    with pytest.raises(AngelForgeError, match="angelforge build"):
        OnnxRuntimeEngine(bundle, 4)
