"""A whole run of `bench device` on a CPU: the interpreter runs the kernels, and clock and memory are replaced."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from support.cuda_calls import Cuda

from angelforge.config import ModelConfig
from angelforge.exporter.synthetic_config import FULL_CONFIG, small_config
from angelforge.plugins import run_kernel
from angelforge.plugins.device.interpreted import exact_numbers
from angelforge.plugins.kernel import Gpu, Tile
from angelforge.plugins.tensorrt import gpu as gpus
from angelforge.plugins.tensorrt.gpu import GpuFacts
from angelforge.precision import Precision
from angelforge.targets import get_target
from angelforge.tools import gpu_needed
from angelforge.tools.cli import main
from angelforge.tools.device_step import measure, precompile
from angelforge.tools.device_step import run as module
from angelforge.tools.device_step.measure import Figures, OperatorTime, measure_case
from angelforge.tools.device_step.memory import Subject
from angelforge.tools.device_step.model import DeviceModel
from angelforge.tools.device_step.report import Report, make_row
from angelforge.tools.device_step.run import run_kernels
from angelforge.tools.device_step.sequences import Case
from angelforge.tools.kernel_bench import run as kernel_bench_run
from angelforge.tools.kernel_bench.capture import CaptureError
from angelforge.tools.kernel_bench.measure import Machine
from angelforge.tools.kernel_bench.statistics import Timing
from angelforge.tools.kernel_bench.warm import Code
from angelforge.tools.kernel_bench.work import Work

MACHINE = Machine("NVIDIA H200", Gpu("sm_90", 132), get_target("h200"), 4.3e12, device="cpu")
FULL = Subject(ModelConfig.from_dict(FULL_CONFIG), Precision.FP8, 131072)
SMALL = ModelConfig.from_dict(small_config())


def figures(case: Case, milliseconds: float, experts: int, **more: Any) -> Figures:
    return Figures(
        case, Timing(1000 * milliseconds, 1.0, 0.0), (experts,) * 31, **{"finite": True, "repeatable": True, **more}
    )


@pytest.fixture
def one_layer(monkeypatch: pytest.MonkeyPatch) -> Subject:
    """Of a small model, on a CPU: a capture computes at once, a replay takes 500 µs, a launch by itself 7."""
    launch = run_kernel.launch

    def exact(*arguments: Any) -> None:
        with exact_numbers():
            launch(*arguments)

    monkeypatch.setattr(run_kernel, "launch", exact)
    Cuda().install(monkeypatch)
    monkeypatch.setattr(measure, "time_calls", lambda calls: Timing(7.0, 7.0, 0.0))
    monkeypatch.setattr(measure, "STEP_WARM", 0.0)
    monkeypatch.setattr(module, "free_bytes", lambda: 2_000_000_000)
    return Subject(SMALL.with_layers(1), Precision.FP8, 65, by_operator=True)


FEW = replace(MACHINE, gpu=Gpu("sm_90", 2))  # programs of a persistent kernel are interpreted one by one


def failing_in(wrong: Mapping[Case, BaseException]) -> Callable[..., Figures]:
    def measured(model: DeviceModel, case: Case, rounds: int) -> Figures:
        if case in wrong:
            raise wrong[case]
        return measure_case(model, case, rounds)

    return measured


def test_a_run_measures_what_fits_and_names_what_does_not(one_layer: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """A case that fails or runs out of memory costs no figure of another; after each all that is known is saved."""
    errors = {Case(2, 3): TypeError("no such argument"), Case(3, 3): torch.cuda.OutOfMemoryError("2 GiB")}
    monkeypatch.setattr(module, "measure_case", failing_in(errors))
    said: list[str] = []
    saved: list[Report] = []
    cases = [Case(2, 3), Case(64, 10**6), Case(3, 3), Case(1, 65)]
    report = run_kernels(FEW, one_layer, SMALL.num_hidden_layers, cases, 4, said.append, saved.append)
    [row] = report.rows
    assert (row.figures.case, row.figures.finite, row.tokens_per_second) == (Case(1, 65), True, 2000.0)
    assert report.problems == ["batch 2 at 3: TypeError: no such argument"]
    assert [case for case, _ in report.left_out] == [Case(64, 10**6), Case(3, 3)]
    assert [(len(known.rows), len(known.failed), len(known.left_out)) for known in saved] == [
        (0, 1, 1), (0, 1, 2), (1, 1, 2),
    ]  # fmt: skip
    table = report.markdown()
    assert "1 of 4 layers in fp8, random weights" in table
    assert "14 kernels a step, 9 to 9 a layer" in table
    assert "not measured: batch 64 at 1000000 needs" in table
    assert "not measured: batch 3 at 3 ran out of the GPU's memory" in table
    assert "wrong: batch 2 at 3: TypeError" in table
    assert any(line.startswith("| batch 1 at 65 | kernels | 0.500 | 0.0 % |") for line in said)
    found = row.figures
    assert (found.repeatable, found.timing, tuple(found.logits.shape)) == (True, Timing(500.0, 500.0, 0.0), (1, 1024))
    assert {item.operator: item.calls for item in found.operators} == {
        "Embedding": 1, "NormQuantize": 1, "Fp8Linear": 3, "QKVPrepare": 1, "PagedAttention": 1, "Linear": 1,
        "AttentionMergeQuantize": 1, "AddNormQuantize": 1, "Fp8GateUp": 1, "AddNorm": 1, "Gather": 2,
    }  # fmt: skip
    assert "| Fp8Linear | 3 | 21 | 21.4 % |" in table  # 14 launches of 7 µs


def test_a_lost_gpu_ends_a_run(one_layer: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "measure_case", failing_in({Case(1, 2): RuntimeError("CUDA error: illegal\nmore")}))
    monkeypatch.setattr(module, "answers", lambda device: False)
    saved: list[Report] = []
    cases = [Case(1, 2), Case(1, 3)]
    report = run_kernels(FEW, one_layer, 4, cases, 1, lambda _: None, saved.append)
    assert report.problems == [
        "batch 1 at 2: RuntimeError: CUDA error: illegal",
        "the GPU does not answer after batch 1 at 2; the run ends",
    ]
    assert saved == [report]


def test_operators_that_cannot_be_timed_cost_no_step(one_layer: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(calls: object) -> Timing:
        raise CaptureError("It cannot be captured.")

    monkeypatch.setattr(measure, "time_calls", fail)
    report = run_kernels(FEW, one_layer, 4, [Case(1, 2)], 1, lambda _: None, lambda _: None)
    assert [row.figures.timing.median for row in report.rows] == [500.0]
    assert "operators could not be timed by themselves: It cannot be captured." in report.problems[0]


def test_the_file_has_what_is_known_when_a_run_is_killed(
    one_layer: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second case of the command; what is compiled ahead is what the first one needs."""
    config, output = tmp_path / "config.json", tmp_path / "device.json"
    config.write_text(json.dumps(small_config()))
    monkeypatch.setattr(gpu_needed, "require_gpu", lambda command: GpuFacts("NVIDIA H200", "sm_90", 2, 10**11, "580"))
    monkeypatch.setattr(kernel_bench_run, "find_machine", lambda facts: FEW)
    compiled: list[tuple[Work, Tile]] = []

    def compile_tiles(tiles: list[tuple[Work, Tile]], architecture: str) -> list[Code]:
        compiled.extend(tiles)
        return [Code(0, 0, 0, "TritonError: odd") for _ in tiles]

    monkeypatch.setattr(precompile, "compile_tiles", compile_tiles)
    monkeypatch.setattr(module, "measure_case", failing_in({Case(2, 2): KeyboardInterrupt()}))
    arguments = ["--layers", "1", "--batch", "1,2", "--context", "2", "--output", str(output)]
    result = CliRunner().invoke(main, ["bench", "device", str(config), *arguments])
    assert result.exit_code == 130, result.output
    assert [step["batch"] for step in json.loads(output.read_text())["steps"]] == [1]
    assert "| batch 1 at 2 | kernels | 0.500" in result.stderr
    assert "cannot be compiled: TritonError: odd" in result.stderr
    assert {work.operator.name for work, _ in compiled} >= {"Fp8Linear", "PagedAttention", "Fp8GateUp", "Embedding"}


def test_figures_follow_from_time_bytes_and_bandwidth() -> None:
    """The goals of the issue: 400 tok/s at batch 1, 80 % of achievable bandwidth at batch 32."""
    fast = make_row(FULL, 32, MACHINE, figures(Case(1, 1024), 2.4, 8))
    assert (fast.goal_met, round(fast.tokens_per_second)) == (True, 417)
    assert fast.limit == pytest.approx(768, rel=1.2e-2)  # PLATFORM.md, with the router in bf16
    assert fast.nominal_share == pytest.approx(417 / 768, rel=1.5e-2)
    assert fast.achievable_share == pytest.approx(fast.nbytes / 2.4e-3 / 4.3e12)
    slow = make_row(FULL, 32, MACHINE, figures(Case(1, 1024), 2.6, 8))
    assert slow.goal_met is False
    many = [make_row(FULL, 32, MACHINE, figures(Case(32, 1024), ms, 163)).goal_met for ms in (20.0, 20.2)]
    assert many == [True, False]
    long = make_row(FULL, 32, MACHINE, figures(Case(1, 131072), 2.4, 8))
    part = make_row(Subject(FULL.config.with_layers(8), Precision.FP8, 1024), 32, MACHINE, figures(Case(1, 1024), 1, 8))
    assert long.goal is part.goal is None  # no GPU reaches 400 tok/s there; part of a model says nothing about all
    other = Machine("NVIDIA A100", Gpu("sm_80", 108), None, 1.5e12)
    assert make_row(FULL, 32, other, figures(Case(32, 1024), 20.0, 163)).limit is None


def test_a_report_says_what_is_wrong() -> None:
    operators = (OperatorTime("Fp8MoEGateUp", 31, 900.0), OperatorTime("Fp8MoEDown", 31, 300.0))
    seen = [
        figures(Case(1, 1024), 2.4, 8, operators=operators),
        figures(Case(32, 1024), 20.0, 163, finite=False, repeatable=False),
    ]
    rows = [make_row(FULL, 32, MACHINE, item) for item in seen]
    report = Report(
        MACHINE, FULL, 32, 386, [9, *[12] * 31], rows, [(Case(32, 131072), "is large")], [], ["a note"], {}, "now"
    )
    assert len(report.problems) == 2
    table = report.markdown()
    assert "| batch 1 at 1K | kernels | 2.400 | 0.0 % | 417 | 76" in table
    assert "≥ 400 tok/s, met |" in table
    assert "| Fp8MoEGateUp | 31 | 900 | 75.0 % |" in table
    assert "386 kernels a step, 9 to 12 a layer" in table
    assert "wrong: batch 32 at 1K through kernels: logits are not finite." in table
    raw = json.loads(json.dumps(report.to_dict()))
    assert raw["steps"][0]["experts"] == [8] * 31
    assert raw["steps"][1]["goal_met"] is True
    assert raw["left_out"] == [{"batch": 32, "context": 131072, "reason": "is large"}]


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpus, "find_gpu", lambda index=0: None)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(small_config()))
    for source in ((), (str(config),)):
        result = CliRunner().invoke(main, ["bench", "device", *source])
        assert result.exit_code == 1
        assert "no NVIDIA GPU" in result.output
        assert "run bench device on a machine with one" in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--batch", "1,x"], "--batch is '1,x', expected positive integers"),
        (["--context", "0"], "--context is '0'"),
        (["--layers", "40"], "40 layers were asked for, but the model has 32"),
        (["nowhere/config.json"], "nowhere/config.json"),
        (["--output", "nowhere/device.json"], "--output names a file in nowhere"),  # not after the first case
    ],
)
def test_wrong_use_is_a_sentence(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(main, ["bench", "device", *arguments])
    assert result.exit_code in (1, 2)
    assert said in result.output
    assert "Traceback" not in result.output
