"""Builds with TensorRT for RTX: whole, cancelled, locked out, failed; and preflights."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tensorrt import graph_bundle, quiet, rtx

from angelforge.atomic import lock
from angelforge.bundle import Bundle
from angelforge.engines import build as building
from angelforge.engines.build import build_tensorrt
from angelforge.engines.limits import BuildOptions
from angelforge.engines.manifest import EngineManifest, file_digest
from angelforge.engines.preflight import nearest_architecture, preflight
from angelforge.engines.tensorrt_layers import read_layers
from angelforge.engines.tensorrt_progress import make_monitor
from angelforge.errors import AngelForgeError, UsageError
from angelforge.plugins.tensorrt.fetched import kernels_of
from angelforge.plugins.tensorrt.gpu import GpuFacts
from angelforge.precision import Precision
from angelforge.targets import get_target

RTX4090 = get_target("rtx4090")
SMALL = BuildOptions(max_tokens=64, max_batch=4)
LARGE = {"hidden_size": 4096, "moe_intermediate_size": 1024, "num_experts": 256, "n_group": 8, "topk_group": 4} | {
    "num_hidden_layers": 8  # 45 GB in bf16
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    rtx()
    return graph_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def built(bundle: Bundle) -> EngineManifest:
    return build_tensorrt(bundle, RTX4090, SMALL, quiet)


def folder(bundle: Bundle) -> Path:
    return bundle.folder / "engines" / "rtx4090"


def test_the_engine_stands_beside_its_manifest(bundle: Bundle, built: EngineManifest) -> None:
    """The manifest says what was built, from what and how; no weight was needed."""
    assert not bundle.weights_present
    engine = folder(bundle) / built.engine
    assert (engine.stat().st_size, file_digest(engine)) == (built.engine_bytes, built.engine_digest)
    assert EngineManifest.load(folder(bundle)) == EngineManifest(**json.loads(built.to_json()))
    assert (built.backend, built.backend_version) == ("tensorrt-rtx", rtx().version)
    assert (built.architecture, built.gpu, built.driver, built.tensor_parallel) == ("sm_89", None, None, 1)
    assert [profile["name"] for profile in built.profiles] == ["decode-8", "prefill"]
    assert built.options == SMALL.to_dict() | {"plugins": "python", "draft_depth": 0}
    assert len(built.activation_bytes) == 2
    assert 0 < built.activation_bytes[0] < built.activation_bytes[1]
    assert set(built.kernels) == set(built.operators) == set(bundle.manifest.operators)
    assert {path.name for path in folder(bundle).iterdir()} == {built.engine, "manifest.json", "build.log"}


def test_one_launch_for_every_operator(bundle: Bundle, built: EngineManifest) -> None:
    """The kept log lists the engine's layers: in every profile each operator once, and no copies beside them."""
    layers = read_layers(folder(bundle) / "build.log")
    model = ir.load(bundle.folder / "model.onnx")
    nodes = sorted(n.name for n in model.graph if n.domain == "angelforge" and n.op_type != "AllReduce")
    for profile in range(len(built.profiles)):
        own = [layer for layer in layers if layer.profile == profile]
        assert sorted(layer.name for layer in own if layer.is_plugin) == nodes
        others = Counter(layer.kind for layer in own if not layer.is_plugin and layer.kind != "shape_call")
        assert set(others) <= {"NoOp", "kgen"}
        assert others["kgen"] <= 1  # the rows that want logits


def test_flags_of_the_build(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """TF32, on by default in TensorRT, is off: it would change routing. TensorRT for RTX allocates nothing in a step,
    which is what it asks of engines whose steps are captured.
    """
    from angelforge.engines import tensorrt_builder

    seen = []
    original = tensorrt_builder._configure

    def spy(parsed: object, request: object) -> object:
        config = original(parsed, request)  # type: ignore[arg-type]
        flags = rtx().api.BuilderFlag
        seen.append((config.get_flag(flags.TF32), config.get_flag(flags.REQUIRE_USER_ALLOCATION)))
        return config

    monkeypatch.setattr(tensorrt_builder, "_configure", spy)
    preflight(bundle, RTX4090, SMALL, quiet)
    assert seen == [(False, True)]


def test_each_build_fetches_its_own_kernels(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of kernels whose code TensorRT does not fetch, those of this build refuse it, not those of the one before."""
    from angelforge.engines import tensorrt_builder

    kernels, parse = kernels_of(rtx()), tensorrt_builder.parse_network
    kernels.tell(b"a", "Linear for up to 8 tokens").encode()
    kernels.tell(b"b", "Linear for up to 64 tokens")
    preflight(bundle, RTX4090, SMALL, quiet)

    def parse_and_tell(*arguments: Any) -> Any:
        kernels.tell(b"a", "Linear for up to 8 tokens").encode()
        kernels.tell(b"b", "Linear for up to 64 tokens")
        return parse(*arguments)

    monkeypatch.setattr(tensorrt_builder, "parse_network", parse_and_tell)
    with pytest.raises(AngelForgeError, match="fetched no code for 1 kernels, first that of Linear for up to 64"):
        preflight(bundle, RTX4090, SMALL, quiet)
    kernels.forget()


def test_progress_rises_to_the_end(bundle: Bundle) -> None:
    shares: list[float] = []
    preflight(bundle, RTX4090, SMALL, lambda phase, share: shares.append(share))
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert len(set(shares)) > 2


def test_a_second_build_is_refused(bundle: Bundle, built: EngineManifest) -> None:
    """Two builds of one engine at once: the second is told who holds the first; the engine stays."""
    with (
        lock(folder(bundle) / ".lock"),
        pytest.raises(AngelForgeError, match=f"in use by another process .pid {os.getpid()}"),
    ):
        build_tensorrt(bundle, RTX4090, SMALL, quiet)
    assert (folder(bundle) / built.engine).is_file()


def test_a_failed_build_leaves_the_last_engine(
    bundle: Bundle, built: EngineManifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message names TensorRT's reason and the log; engine and manifest are those of before."""
    before = EngineManifest.load(folder(bundle))

    def fail(*arguments: object) -> bytes:
        raise AngelForgeError("no")

    monkeypatch.setattr(building, "build_engine", fail)
    with pytest.raises(AngelForgeError, match="no"):
        build_tensorrt(bundle, RTX4090, SMALL, quiet)
    assert EngineManifest.load(folder(bundle)) == before
    assert (folder(bundle) / built.engine).is_file()


def test_a_new_engine_replaces_the_old(tmp_path: Path) -> None:
    rtx()
    bundle = graph_bundle(tmp_path)
    first = build_tensorrt(bundle, RTX4090, BuildOptions(max_tokens=8, max_batch=2), quiet)
    second = build_tensorrt(bundle, RTX4090, BuildOptions(max_tokens=8, max_batch=3), quiet)
    assert first.engine != second.engine
    assert [path.name for path in folder(bundle).glob("*.engine")] == [second.engine]


@pytest.mark.parametrize("precision", [Precision.BF16, Precision.FP8])
def test_a_draft_is_built_with_its_target(precision: Precision, tmp_path: Path) -> None:
    """Two engines, each with the digest of the other's graph; logits of verified tokens fit the profiles."""
    rtx()
    bundle = graph_bundle(tmp_path, precision, draft=True)
    shares: list[float] = []
    target = build_tensorrt(
        bundle, RTX4090, BuildOptions(max_tokens=64, max_batch=2), lambda phase, share: shares.append(share)
    )
    draft = EngineManifest.load(folder(bundle), "draft.json")
    assert target.draft_digest == draft.graph_digest == file_digest(bundle.folder / "draft.onnx")
    assert draft.target_digest == target.graph_digest
    assert {path.name for path in folder(bundle).glob("*.engine")} == {target.engine, draft.engine}
    assert target.options["draft_depth"] == draft.options["draft_depth"] == 3
    assert [profile["logit_rows"]["most"] for profile in target.profiles] == [8, 8]
    assert (folder(bundle) / "draft.log").is_file()
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)
    found = preflight(bundle, get_target("h20"), BuildOptions(max_tokens=64, max_batch=2), quiet)
    assert found.engine_bytes > target.engine_bytes


CANCELLED = """
import os, signal, sys, threading
from pathlib import Path
from angelforge.bundle import Bundle
from angelforge.engines.build import build_tensorrt
from angelforge.engines.limits import BuildOptions
from angelforge.targets import get_target
sent = []
def report(phase, share):
    if share > 0 and not sent:
        sent.append(os.kill(os.getpid(), signal.SIGINT))
try:
    build_tensorrt(Bundle.open(sys.argv[1]), get_target("rtx4090"), BuildOptions(), report)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_ctrl_c_ends_a_build(tmp_path: Path) -> None:
    """Within a step of TensorRT's, without a crash, an engine or a lock left behind."""
    rtx()
    bundle = graph_bundle(tmp_path)
    result = subprocess.run(
        [sys.executable, "-c", CANCELLED, str(bundle.folder)], capture_output=True, text=True, check=False, timeout=120
    )
    assert (result.stdout, result.returncode) == ("interrupted\n", 0), result.stderr
    assert [path.name for path in folder(bundle).iterdir()] == ["build.log"]


@pytest.mark.parametrize("target", ["h20", "h200", "rtx4090", "rtx5090"])
def test_preflight_builds_for_any_target(target: str, tmp_path: Path) -> None:
    """FP8 too; what it proves is said plainly, and nothing is written."""
    rtx()
    bundle = graph_bundle(tmp_path, Precision.FP8)
    found = preflight(bundle, get_target(target), SMALL, quiet)
    assert found.built_for == {"rtx5090": "sm_120"}.get(target, "sm_89")
    assert found.weights == len(_initializers(bundle))
    assert found.problem is None
    own = "Nothing was kept" if target.startswith("rtx") else f"This is not the engine of {target} "
    assert own in found.verdict
    assert not (bundle.folder / "engines").exists()


def _initializers(bundle: Bundle) -> list[str]:
    return list(ir.load(bundle.folder / "model.onnx").graph.initializers)


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 64},
        {"num_shared_experts": 2, "first_k_dense_replace": 2, "num_hidden_layers": 3},
        {"num_experts": 24, "n_group": 3, "topk_group": 2, "num_experts_per_tok": 5, "hidden_size": 384},
        {"first_k_dense_replace": 2, "num_hidden_layers": 2},
    ],
)
def test_other_sizes_build(sizes: dict[str, int], tmp_path: Path) -> None:
    """Sizes other than AntAngelMed's: heads, groups, shared experts, dense layers, none but dense layers."""
    rtx()
    bundle = graph_bundle(tmp_path, Precision.FP8, **sizes)
    assert preflight(bundle, get_target("h20"), SMALL, quiet).engine_bytes > 0


def test_preflight_tells_what_does_not_fit(tmp_path: Path) -> None:
    """A model too large for the target builds all the same, with the planner's figures in the report."""
    rtx()
    bundle = graph_bundle(tmp_path, **LARGE)
    found = preflight(bundle, RTX4090, SMALL, quiet)
    assert found.problem is not None
    assert "memory" in found.problem


def test_a_model_that_does_not_fit_is_not_built(tmp_path: Path) -> None:
    """With the figures and what helps; a pool size of one's own overrides the plan."""
    rtx()
    bundle = graph_bundle(tmp_path, **LARGE)
    with pytest.raises(AngelForgeError, match=r"does not fit on rtx4090: .* What helps: .*--target l20"):
        build_tensorrt(bundle, RTX4090, SMALL, quiet)


def test_the_nearest_architecture() -> None:
    library = rtx()
    assert nearest_architecture(library, "sm_90", Precision.FP8) == "sm_89"
    assert nearest_architecture(library, "sm_120", Precision.FP8) == "sm_120"
    assert nearest_architecture(library, "sm_80", Precision.FP8) == "sm_89"
    assert nearest_architecture(library, "sm_80", Precision.BF16) == "sm_80"
    assert nearest_architecture(library, "sm_75", Precision.BF16) == "sm_80"


def test_tensorrt_builds_on_its_own_gpu_only(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU, or on another one than the target's: refused before anything is loaded."""
    monkeypatch.setattr("angelforge.plugins.tensorrt.gpu.find_gpu", lambda: None)
    with pytest.raises(AngelForgeError, match=r"no NVIDIA GPU.*use --preflight"):
        build_tensorrt(bundle, get_target("h20"), SMALL, quiet)
    h200 = GpuFacts("NVIDIA H200", "sm_90", 132, 150_000_000_000, "580.1")
    monkeypatch.setattr("angelforge.plugins.tensorrt.gpu.find_gpu", lambda: h200)
    refused = r"this is a NVIDIA H200 .sm_90, 132 SMs, 150 GB., but h20 has sm_90, 78 SMs and 103 GB"
    with pytest.raises(AngelForgeError, match=refused):
        build_tensorrt(bundle, get_target("h20"), SMALL, quiet)
    # The same chip with other memory: the pool would be too large, or too small.
    for memory, name in ((102_600_000_000, "h20-141g"), (150_700_000_000, "h20")):
        h20 = GpuFacts("NVIDIA H20", "sm_90", 78, memory, "580.1")
        monkeypatch.setattr("angelforge.plugins.tensorrt.gpu.find_gpu", lambda h20=h20: h20)
        with pytest.raises(AngelForgeError, match=f"but {name} has sm_90, 78 SMs and"):
            build_tensorrt(bundle, get_target(name), SMALL, quiet)


def test_ranks_need_their_graph(bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="has no graph for 2 ranks"):
        build_tensorrt(bundle, RTX4090, BuildOptions(tensor_parallel=2), quiet)


def test_the_optimization_level_is_checked() -> None:
    with pytest.raises(UsageError, match="level is 6, but TensorRT has 0 to 5"):
        BuildOptions(optimization_level=6)


def test_threads_see_one_build_each() -> None:
    """No test above left a thread of TensorRT's at work."""
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tensorrt-build")]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["a", "b", "c", None])), min_size=1, max_size=6))
def test_progress_ends_whatever_phases_are_called(phases: list[tuple[str, str | None]]) -> None:
    """TensorRT names a phase and the one around it; two of one name may be each other's parents, or their own."""
    shares: list[float] = []
    monitor = make_monitor(rtx(), lambda phase, share: shares.append(share), threading.Event())
    for name, parent in phases:
        monitor.phase_start(name, parent, 3)
    for name, _ in phases:
        assert monitor.step_complete(name, 0)
    assert len(shares) == len(phases)
