"""Target `cuda`: built without a GPU, and run by the same code with the CPU's provider in the place of CUDA's."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from support.built import Sequences
from support.empty_cuda import empty_cuda

from angelforge import LLM, SamplingParams
from angelforge.bundle import Bundle
from angelforge.engines.cpu import build_cpu, build_onnxruntime, engine_folder
from angelforge.engines.manifest import EngineManifest
from angelforge.errors import AngelForgeError, UsageError
from angelforge.exporter.export import ExportOptions, export
from angelforge.exporter.synthetic import small_config, write_checkpoint
from angelforge.exporter.synthetic_draft import write_draft
from angelforge.plugins.tensorrt.gpu import GpuFacts, find_gpu
from angelforge.precision import Precision
from angelforge.runtime import onnxruntime_device
from angelforge.runtime.onnxruntime_device import CPU, OrtDevice, open_device
from angelforge.runtime.onnxruntime_draft import OnnxRuntimeDraft
from angelforge.runtime.onnxruntime_engine import OnnxRuntimeEngine
from angelforge.runtime.validate.cuda_graph import ProviderRunner
from angelforge.targets import get_target
from angelforge.tools.cli import main

STAND_IN = OrtDevice((CPU,), "cpu")
# What costs time or must be exact. Arithmetic on shapes is the CPU's.
ON_THE_GPU = {"Cast", "DequantizeLinear", "Gemm", "If", "Loop", "MatMul", "RMSNormalization", "RotaryEmbedding", "Scan"}
ON_THE_GPU |= {"Gather", "GatherElements", "ScatterElements", "ScatterND", "Sigmoid", "Softmax", "TopK", "Transpose"}
START = """
import json, sys
from pathlib import Path
import numpy as np, onnxruntime
from angelforge.bundle import Bundle
from angelforge.engines.cpu import build_onnxruntime
from angelforge.runtime import onnxruntime_session
from angelforge.runtime.onnxruntime_device import CPU, CUDA, OrtDevice
from angelforge.runtime.onnxruntime_engine import OnnxRuntimeEngine
bundle = Bundle.open(Path(sys.argv[1]))
build_onnxruntime(bundle, "cuda")
plain = onnxruntime_session.session_options
def telling(*args):
    options = plain(*args)
    options.log_severity_level, options.log_verbosity_level = 0, 1
    return options
onnxruntime_session.session_options = telling
engine = OnnxRuntimeEngine(bundle, 6, target="cuda", device=OrtDevice((CUDA, CPU), "cuda", 10**9))
pool, states = engine.pools[0], engine._session.place(np.arange(6, dtype=np.float32))
print(json.dumps({
    "zeros": not pool.any(), "writeable": pool.flags.writeable, "shape": pool.shape,
    "device": states.device_name(), "states": states.numpy().tolist(),
}))
engine.close()
"""
PROMPTS = [[5, 17, 99], [3] * 70]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A small model in bf16 with a draft, built for both targets."""
    folder = tmp_path_factory.mktemp("cuda")
    checkpoint = write_checkpoint(folder / "checkpoint", small_config(num_hidden_layers=3))
    draft = write_draft(folder / "draft", checkpoint)
    made = export(str(checkpoint), folder / "bundle", ExportOptions(draft=str(draft), precision=Precision.BF16))
    build_cpu(made)
    build_onnxruntime(made, "cuda")
    return made


@pytest.fixture
def engine(bundle: Bundle) -> Iterator[OnnxRuntimeEngine]:
    """What was built for `cuda`, on the CPU."""
    made = OnnxRuntimeEngine(bundle, 6, target="cuda", device=STAND_IN)
    yield made
    made.close()


def test_it_is_built_without_a_gpu(bundle: Bundle) -> None:
    """The engine holds ONNX's own operators alone: what is fused for the CPU another provider may lack."""
    folder = engine_folder(bundle, "cuda")
    manifest = EngineManifest.load(folder)
    assert (manifest.target, manifest.backend, manifest.architecture) == ("cuda", "onnxruntime", "cuda")
    for file in ("manifest.json", "draft.json"):
        graph = onnx.load(folder / EngineManifest.load(folder, file).engine, load_external_data=False).graph
        assert {domain for each in _graphs(graph) for domain in (node.domain for node in each.node)} == {""}


def test_it_computes_what_the_cpu_engine_does(bundle: Bundle, engine: OnnxRuntimeEngine) -> None:
    """Prompts and a step after them, in place: of the pool only the slots of the tokens are written."""
    other = OnnxRuntimeEngine(bundle, 6)
    addresses = [pool.ctypes.data for pool in engine.pools]
    for pool in (*engine.pools, *other.pools):
        pool[:] = 7.0
    mine, theirs = Sequences(engine, [[1, 2], [4, 3]]), Sequences(other, [[1, 2], [4, 3]])
    for tokens in (PROMPTS, [[8], [9]]):
        for found, expected in zip(mine.call(tokens), theirs.call(tokens), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(engine.draft_hidden.numpy(), other.draft_hidden.numpy(), rtol=1e-5, atol=1e-5)
    assert [pool.ctypes.data for pool in engine.pools] == addresses
    for pool, expected in zip(engine.pools, other.pools, strict=True):
        written = (pool != 7.0).any(axis=(1, 2, 4))  # [pages, page_size]
        assert (written.sum(axis=1) == [0, 4, 0, 7, 64, 0]).all()
        np.testing.assert_allclose(pool, expected, rtol=1e-5, atol=1e-5)


def test_its_draft_proposes_what_the_cpu_engines_draft_does(bundle: Bundle) -> None:
    """The same tokens out of as many proposals and acceptances."""
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    said = []
    for target in ("cuda", "cpu"):
        engine = OnnxRuntimeEngine(bundle, 6, target=target, device=STAND_IN)
        with LLM.from_engine(engine, draft=OnnxRuntimeDraft(bundle, engine), speculate=2) as llm:
            outputs, report = llm.generate(PROMPTS, params), llm.speculation
        assert report is not None and report.proposed > 0
        said.append(([each.token_ids for each in outputs], report.proposed, report.accepted))
    assert said[0] == said[1]


@pytest.mark.skipif(find_gpu() is not None, reason="what is missing here is there")
def test_running_it_without_a_gpu_says_what_is_missing(bundle: Bundle, tmp_path: Path) -> None:
    """A sentence, not a fallback to the CPU."""
    ids = tmp_path / "ids.json"
    ids.write_text("[5, 6]")
    result = CliRunner().invoke(main, ["run", str(bundle.folder), "--target", "cuda", "--tokens", str(ids)])
    assert result.exit_code == 1
    assert "needs an NVIDIA GPU" in result.output and "Traceback" not in result.output


@pytest.mark.skipif(find_gpu() is not None, reason="CUDA may start here")
def test_a_provider_that_does_not_start_is_an_error(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime by itself would compute on the CPU, and `validate` compare that, with a warning alone."""
    facts = GpuFacts("NVIDIA L4", "sm_89", 58, 24 * 10**9, "580.65.06")
    monkeypatch.setattr(onnxruntime_device, "find_gpu", lambda: facts)
    device = open_device(get_target("cuda"))
    assert (device.name, device.memory_bytes) == ("cuda", facts.memory_bytes)
    with pytest.raises(AngelForgeError, match=r"cannot (start its CUDAExecutionProvider|load the engine)"):
        OnnxRuntimeEngine(bundle, 6, target="cuda", device=device)
    with pytest.raises(AngelForgeError, match=r"cannot (start its CUDAExecutionProvider|load a piece of the graph)"):
        ProviderRunner(bundle, "ONNX Runtime CUDA", device.providers).open_stages()


def test_the_cuda_provider_takes_all_that_matters(tmp_path: Path) -> None:
    """ONNX Runtime's real provider over empty CUDA libraries: who runs which node in FP8, and whose memory is whose."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint", small_config(num_hidden_layers=2))
    made = export(str(checkpoint), tmp_path / "bundle", ExportOptions(precision=Precision.FP8))
    (tmp_path / "cuda").mkdir()
    result = subprocess.run(
        [sys.executable, "-c", START, str(made.folder)],
        env={**os.environ, "LD_LIBRARY_PATH": str(empty_cuda(tmp_path / "cuda"))},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert json.loads(result.stdout) == {
        "zeros": True,
        "writeable": False,
        "shape": [6, 2, 2, 64, 32],
        "device": "cuda",
        "states": [0, 1, 2, 3, 4, 5],
    }
    placed: dict[str, set[str]] = {}
    provider = ""
    for line in result.stderr.splitlines():
        if found := re.search(r"placed on \[(\w+)\]", line):
            provider = found[1]
        elif found := re.search(r"VerifyEachNodeIsAssignedToAnEp\]\s+(\w+) \(", line):
            placed.setdefault(provider, set()).add(found[1])
    assert placed["CUDAExecutionProvider"] >= ON_THE_GPU
    assert not placed["CPUExecutionProvider"] & ON_THE_GPU


def test_ranks_are_refused_before_anything_is_done(bundle: Bundle) -> None:
    """Wrong use: one GPU."""
    with pytest.raises(UsageError, match="runs on one GPU"):
        build_onnxruntime(bundle, "cuda", 2)
    result = CliRunner().invoke(main, ["build", str(bundle.folder), "--target", "cuda", "--tensor-parallel", "2"])
    assert result.exit_code == 2 and "runs on one GPU" in result.output
    assert set(Bundle.open(bundle.folder).manifest.graphs) == {"target", "draft"}


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)
