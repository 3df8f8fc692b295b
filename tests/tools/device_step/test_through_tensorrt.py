"""Steps through TensorRT's runtime with random weights; ONNX Runtime computes in TensorRT's place, on a CPU."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime
import pytest
import torch
from support import tensorrt_on_cpu

from angelforge.bundle import Bundle
from angelforge.config import ModelConfig
from angelforge.engines.build import kernel_digests
from angelforge.engines.limits import BuildOptions
from angelforge.engines.manifest import EngineManifest, bundle_facts, graph_facts
from angelforge.engines.preparation import prepare_build
from angelforge.engines.profiles import StepLimits, make_profiles
from angelforge.engines.tensorrt_loading import TensorrtEngine
from angelforge.errors import AngelForgeError
from angelforge.exporter.graph import build_graph
from angelforge.exporter.synthetic_config import FULL_CONFIG, small_config
from angelforge.plugins.kernel import Gpu
from angelforge.plugins.tensorrt.gpu import GpuFacts
from angelforge.precision import Precision
from angelforge.runtime.batch import INPUTS
from angelforge.runtime.device import open_device
from angelforge.targets import get_target
from angelforge.tools.device_step import through_tensorrt as module
from angelforge.tools.device_step.graph_bundle import write_graph_bundle
from angelforge.tools.device_step.measure import Figures
from angelforge.tools.device_step.memory import PAGE_SIZE, Subject
from angelforge.tools.device_step.model import fill_pools
from angelforge.tools.device_step.report import Report, make_row
from angelforge.tools.device_step.run import add_tensorrt
from angelforge.tools.device_step.sequences import Case, decode_batch
from angelforge.tools.device_step.weights import empty_weights, fill_weights
from angelforge.tools.kernel_bench.measure import Machine
from angelforge.tools.kernel_bench.statistics import Timing

SUBJECT = Subject(ModelConfig.from_dict(small_config()).with_layers(2), Precision.FP32, 100)
CASES = [Case(1, 100), Case(3, 70)]
PAGES = 7  # of the larger one
FACTS = GpuFacts("NVIDIA H200", "sm_90", 132, 150_700_000_000, "580.65.06")
MACHINE = Machine("NVIDIA H200", Gpu("sm_90", 132), get_target("h200"), 4.3e12, device="cpu")


@dataclass
class Expected:
    """The graph in an ONNX Runtime session of its own, on weights and pools made apart from the engine's."""

    session: onnxruntime.InferenceSession
    values: dict[str, torch.Tensor]

    def logits(self, case: Case) -> torch.Tensor:
        batch = decode_batch(SUBJECT.config, case, PAGE_SIZE, SUBJECT.seed)
        feeds = {name: value.numpy() for name, value in self.values.items()}
        feeds |= {name: getattr(batch, name) for name in INPUTS}
        return torch.from_numpy(self.session.run(["logits"], feeds)[0])

    def before(self, case: Case) -> Figures:
        """What the kernels would have told of a case."""
        return Figures(case, Timing(9.0, 9.0, 0.0), (5,), True, True, logits=self.logits(case))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_graph_bundle(SUBJECT, tmp_path_factory.mktemp("graph-bundle"))


@pytest.fixture(scope="module")
def expected(bundle: Bundle) -> Expected:
    plan = tensorrt_on_cpu.plan_of(ir.load(bundle.folder / "model.onnx"))
    weights = empty_weights(build_graph(SUBJECT.config, SUBJECT.precision, PAGE_SIZE, SUBJECT.max_context), "cpu")
    fill_weights(weights, SUBJECT.config.rope_theta, SUBJECT.seed)
    pools = [torch.empty(PAGES, 2, 2, PAGE_SIZE, 32) for _ in range(2)]
    fill_pools(pools, SUBJECT.seed)
    values = {**weights, **{f"kv_cache.{i}": pool for i, pool in enumerate(pools)}}
    return Expected(onnxruntime.InferenceSession(plan, providers=["CPUExecutionProvider"]), values)


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with TensorRT, where an engine's plan is its graph, and a clock of the host."""
    profiles = make_profiles(StepLimits(96, 3, SUBJECT.max_context, PAGE_SIZE, PAGES, 0))

    def build(bundle: Bundle, library: Any, facts: GpuFacts, cases: list[Case]) -> TensorrtEngine:
        plan = tensorrt_on_cpu.plan_of(ir.load(bundle.folder / "model.onnx"))
        manifest = EngineManifest(
            target="this-gpu", backend="tensorrt", backend_version="11.4.0", engine="e", engine_digest="",
            engine_bytes=len(plan), architecture="sm_90", seconds=0.0, kernels=kernel_digests(bundle),
            profiles=[profile.to_dict() for profile in profiles], activation_bytes=[5000],
            options={"plugins": "aot"}, **bundle_facts(bundle), **graph_facts(bundle, "target"),
        )  # fmt: skip
        return TensorrtEngine(manifest, profiles, plan)

    def spans(work: Callable[[], object], count: int, each: int) -> list[float]:
        work()
        return [800.0 / each] * count

    library = tensorrt_on_cpu.make_library(profiles)
    monkeypatch.setattr(module, "find_library", lambda machine: library)
    monkeypatch.setattr(module, "build_engine", build)
    monkeypatch.setattr(module, "open_device", lambda name: open_device("cpu"))
    monkeypatch.setattr(module, "spans", spans)
    monkeypatch.setattr(module, "warm_up", lambda work, seconds: work())


def report_of(rows: list[Figures]) -> Report:
    made = [make_row(SUBJECT, 2, MACHINE, figures) for figures in rows]
    return Report(MACHINE, SUBJECT, 2, 26, [9, 12], made, [], [], (), {}, "now")


@pytest.mark.usefixtures("tensorrt")
def test_the_engine_runs_the_same_steps_on_the_same_weights(expected: Expected) -> None:
    """Its logits are those of the graph on weights that were made apart, from the same seed."""
    said: list[str] = []
    saved: list[Report] = []
    before = report_of([expected.before(case) for case in CASES])
    report = add_tensorrt(before, FACTS, 3, said.append, saved.append)
    assert report.problems == []
    assert [row.figures.through for row in report.rows] == ["kernels"] * 2 + ["TensorRT"] * 2
    for row in report.rows[2:]:
        figures = row.figures
        assert torch.allclose(figures.logits, expected.logits(figures.case), atol=1e-4)
        assert figures.cosine == pytest.approx(1.0, abs=1e-6)
        assert (figures.experts, figures.repeatable, figures.timing.median) == ((5,), True, 800.0 / module.STEPS)
    assert "| batch 3 at 70 | TensorRT | 0.100 | 0.0 % | 30000 |" in report.markdown()
    assert "building the engine" in said[0]
    assert [len(known.rows) for known in saved] == [3, 4]  # each as soon as it is known


@pytest.mark.usefixtures("tensorrt")
def test_other_results_are_told(expected: Expected) -> None:
    """As from weights bound to other inputs."""
    before = expected.before(CASES[0])
    other = replace(before, logits=torch.randn(before.logits.shape, generator=torch.Generator().manual_seed(1)))
    report = add_tensorrt(report_of([other]), FACTS, 1, lambda _: None, lambda _: None)
    assert len(report.problems) == 1
    assert "through TensorRT: logits differ from the kernels'" in report.problems[0]


@pytest.mark.usefixtures("tensorrt")
def test_a_failure_leaves_the_figures_of_the_kernels(expected: Expected, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is gone in the midst of loading, as torch tells it."""

    def fail(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    monkeypatch.setattr(module, "random_engine", fail)
    report = add_tensorrt(report_of([expected.before(CASES[0])]), FACTS, 1, lambda _: None, lambda _: None)
    assert (len(report.rows), report.notes) == (1, ("Not through TensorRT: OutOfMemoryError: CUDA out of memory.",))


def test_why_not_is_a_sentence(expected: Expected, monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures of the kernels stand."""

    def missing(flavour: str) -> None:
        raise AngelForgeError(f"{flavour} is not installed.")

    monkeypatch.setattr(module, "load_library", missing)
    rows = [expected.before(CASES[0])]
    report = add_tensorrt(report_of(rows), FACTS, 1, lambda _: None, lambda _: None)
    assert (report.notes, report.problems) == (
        ("Not through TensorRT: tensorrt is not installed. tensorrt-rtx is not installed.",),
        [],
    )
    assert report.notes[0] in report.markdown()
    nowhere = Machine("NVIDIA A100", Gpu("sm_80", 108), None, 1.5e12, device="cpu")
    assert (
        "tensorrt-rtx"
        in add_tensorrt(replace(report_of(rows), machine=nowhere), FACTS, 1, lambda _: None, lambda _: None).notes[0]
    )
    failed = replace(report_of(rows), failed=["batch 1 at 100: CUDA error"])
    assert "Not tried through TensorRT" in add_tensorrt(failed, FACTS, 1, lambda _: None, lambda _: None).notes[0]


def test_the_real_shape_can_be_built(tmp_path: Path) -> None:
    """Two layers of AntAngelMed at 128K, which its configuration does not cover: stretched, planned, kernels found."""
    config = ModelConfig.from_dict(FULL_CONFIG).with_layers(2)
    bundle = write_graph_bundle(Subject(config, Precision.FP8, 131072), tmp_path)
    assert bundle.manifest.model.max_context == 131072
    assert not bundle.weights_present
    prepared = prepare_build(bundle, get_target("h200"), BuildOptions(max_tokens=512, max_batch=32, pages=2049))
    assert prepared.plan.fits
    assert prepared.profiles[-1].pages_per_sequence.most == 2048
