"""A whole run of `bench kernels` on a CPU: the interpreter runs the kernels, and clocks are replaced."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from support import engines_in_torch
from support.interpreter import run_interpreted

from angelforge.errors import AngelForgeError
from angelforge.plugins.kernel import Gpu, Tile
from angelforge.plugins.tensorrt import gpu as gpus
from angelforge.plugins.tensorrt.gpu import GpuFacts
from angelforge.plugins.tensorrt.kernels import find_kernel
from angelforge.plugins.tuning import read_rows
from angelforge.targets import get_target
from angelforge.tools import bench_kernels, gpu_needed
from angelforge.tools.cli import main
from angelforge.tools.kernel_bench import measure, run, tuner, warm, work
from angelforge.tools.kernel_bench.checks import check_config
from angelforge.tools.kernel_bench.execution import copies
from angelforge.tools.kernel_bench.measure import Machine, default_tile
from angelforge.tools.kernel_bench.rivals import beside
from angelforge.tools.kernel_bench.run import Deadline, Trouble
from angelforge.tools.kernel_bench.statistics import Timing
from angelforge.tools.kernel_bench.tuner import FREE, LIMITS, Task, best_row, candidates, tasks, usable
from angelforge.tools.kernel_bench.warm import Code, compile_tile

GPU = Gpu("sm_90", 2)
MACHINE = Machine("NVIDIA H200", GPU, get_target("h200"), 4.3e12, device="cpu")
OPERATORS = ("MoECombine", "Fp8Linear")
GOOD = Code(registers=64, shared=1024, spills=0)


def interpret(work: work.Work, inputs: Sequence[torch.Tensor], tile: Tile, gpu: Gpu) -> Sequence[torch.Tensor]:
    return run_interpreted(find_kernel(work.operator), copies(work, inputs), work.attributes, gpu=gpu, tile=tile)


@pytest.fixture
def no_gpu_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small model at two and three tokens; launches take as many µs as their tile has stages."""
    real = run.works
    few = lambda config, *_: [w for w in real(config, (2, 3), ()) if w.label in ("", "down")]  # noqa: E731
    monkeypatch.setattr(run, "works", few)
    monkeypatch.setattr(run, "full_config", check_config)
    checked = lambda gpu, names: [(w, default_tile(w, gpu)) for w in few(check_config()) if w.operator.name in names]  # noqa: E731
    monkeypatch.setattr(run, "check_works", checked)
    monkeypatch.setattr(run, "execute", interpret)
    monkeypatch.setattr(measure, "execute", interpret)
    monkeypatch.setattr(measure, "ptx_equals_triton", lambda *_: True)
    clock: Callable[..., Timing] = lambda _, sets, tile, gpu: Timing(float(tile.stages), 1.0, 0.0)  # noqa: E731
    monkeypatch.setattr(measure, "time_work", clock)
    monkeypatch.setattr(tuner, "time_work", clock)
    monkeypatch.setattr(measure, "time_calls", lambda calls: Timing(9.0, 9.0, 0.0))
    compiled = lambda jobs, architecture: [GOOD for _ in jobs]  # noqa: E731
    monkeypatch.setattr(run, "compile_tiles", compiled)
    monkeypatch.setattr(tuner, "compile_tiles", compiled)


@pytest.mark.usefixtures("no_gpu_needed")
def test_a_run_checks_and_measures_everything() -> None:
    """Every call is compared with its body and with plain torch; the table and JSON hold the figures."""
    said: list[str] = []
    report = run.run(MACHINE, OPERATORS, Deadline(300), 1, said.append)
    names = {m.work.name for m in report.measurements}
    assert names == {f"{name}, T = {t}" for name in ("MoECombine", "Fp8Linear down") for t in (2, 3)}
    assert report.problems == []
    assert len(report.checks) == 4
    assert all(m.right and m.verdict is not None for m in report.measurements)
    assert [m.ptx_equal for m in report.measurements].count(None) == 2  # a tile's PTX is compared once
    found = next(m for m in report.measurements if m.work.name == "Fp8Linear down, T = 3")
    assert found.rival == ("linear bf16", 9.0)
    assert found.peak_share == pytest.approx(found.cost.flops / (found.timing.median * 1e-6) / 1979e12)
    assert found.limit == pytest.approx(found.cost.nbytes / 4.8e12 * 1e6)  # bound by memory
    assert found.achievable_share == pytest.approx(found.cost.nbytes / (found.timing.median * 1e-6) / 4.3e12)
    raw = json.loads(json.dumps(report.to_dict()))
    assert len(raw["measurements"]) == len(raw["body_checks"]) == 4
    table = report.markdown()
    assert "NVIDIA H200 (sm_90, 2 SMs)" in table
    assert "4 of 4 checks against function bodies hold" in table
    assert table.count("| Fp8Linear down") == 2
    assert any("MoECombine, T = 2: 1.0 µs" in line for line in said)


@pytest.mark.usefixtures("no_gpu_needed")
def test_wrong_results_and_missing_time_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel whose last row is wrong, other bits from the PTX; and a run that has no time at all."""

    def wrong(*call: object) -> Sequence[torch.Tensor]:
        outputs = interpret(*call)  # type: ignore[arg-type]
        outputs[0][-1] *= 1.5
        return outputs

    monkeypatch.setattr(measure, "execute", wrong)
    monkeypatch.setattr(measure, "ptx_equals_triton", lambda *_: False)
    report = run.run(MACHINE, ("MoECombine",), Deadline(300), 1, lambda _: None)
    assert sum("mixed is off by" in problem for problem in report.problems) == 2
    assert sum("gives other bits" in problem for problem in report.problems) == 1
    assert "wrong: MoECombine, T = 2" in report.markdown()
    late = run.run(MACHINE, ("MoECombine",), Deadline(-1), 1, lambda _: None)
    assert (late.measurements, late.checks) == ([], [])
    assert "No time was left for 4 calls: MoECombine" in late.markdown()


@pytest.mark.usefixtures("no_gpu_needed")
def test_other_engines_follow_what_is_already_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our table and figures are out before foreign code runs; what it prints stays out of the table."""
    monkeypatch.setattr(run, "find_machine", lambda facts: MACHINE)
    monkeypatch.setattr(bench_kernels, "require_gpu", lambda command: None)
    monkeypatch.setattr(beside, "execute", interpret)
    monkeypatch.setattr(beside, "time_calls", lambda calls: Timing(2.0, 2.0, 0.0))
    engines_in_torch.install(monkeypatch)
    saved: list[dict[str, Any]] = []
    file = tmp_path / "k.json"
    real = engines_in_torch.fp8_gemm_nt

    def chatty(*arguments: Any, **named: Any) -> None:
        saved.append(json.loads(file.read_text()))
        print("compiling")
        real(*arguments, **named)

    monkeypatch.setattr(sys.modules["deep_gemm"], "fp8_gemm_nt", chatty)
    command = ["bench", "kernels", "--operator", "Fp8Linear", "--json", str(file)]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert all(len(found["measurements"]) == 2 for found in saved)
    known = [found["other_engines"] and len(found["other_engines"]["rows"]) for found in saved]
    assert known[0] is None and known[-1] == 4  # a call's rows are in the file before the next call begins
    assert "compiling" in result.stderr and "compiling" not in result.stdout
    rows = json.loads(file.read_text())["other_engines"]["rows"]
    assert {(row["engine"], row["kernel"]) for row in rows} == {
        ("DeepGEMM", "fp8_gemm_nt"),
        ("vLLM", "w8a8_triton_block_scaled_mm"),
        ("vLLM", "cutlass_scaled_mm"),
        ("FlashInfer", "fp8_blockscale_gemm_sm90"),
    }
    assert all(row["problem"] is None and row["ratio"] > 0 for row in rows)
    assert result.stdout.count("| Fp8Linear down, T = 2 |") == 1 + 4  # ours, theirs
    alone = CliRunner().invoke(main, [*command, "--own-only"])
    assert alone.stdout.count("| Fp8Linear down, T = 2 |") == 1
    assert json.loads(file.read_text())["other_engines"] is None


def test_one_failure_does_not_end_a_run_but_a_lost_gpu_does(monkeypatch: pytest.MonkeyPatch) -> None:
    call, trouble, deadline = work.works(check_config(), (1,), ())[0], Trouble([], []), Deadline(99)
    answering = [True, True, True, True, False]
    monkeypatch.setattr(run, "answers", lambda device: answering.pop(0))

    def fail(error: Exception) -> Callable[[], int]:
        def function() -> int:
            raise error

        return function

    assert trouble.attempt(call, deadline, lambda: 1) == [1]
    assert trouble.attempt(call, deadline, fail(AngelForgeError("no kernel"))) == []
    assert trouble.attempt(call, deadline, fail(torch.cuda.OutOfMemoryError("2 GiB"))) == []
    assert trouble.attempt(call, deadline, fail(FileNotFoundError("gcc"))) == []
    assert trouble.attempt(call, deadline, fail(TypeError("no such argument"))) == []
    assert trouble.attempt(call, deadline, lambda: 2) == [2]
    assert trouble.attempt(call, deadline, fail(RuntimeError("illegal memory access\nmore"))) == []
    assert trouble.attempt(call, deadline, lambda: 3) == []
    assert trouble.failed == [
        f"{call.name}: no kernel",
        f"{call.name}: FileNotFoundError: gcc",
        f"{call.name}: TypeError: no such argument",
        f"{call.name}: RuntimeError: illegal memory access",
        f"the GPU does not answer after {call.name}; the run ends here",
    ]
    assert trouble.skipped == [f"{call.name} (too little GPU memory)", call.name]


@pytest.mark.usefixtures("no_gpu_needed")
def test_tuning_writes_the_fastest_right_tile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock likes few stages; a tile that gives wrong results is left out though it is the fastest."""
    call = next(w for w in work.works(check_config(), (3,), ()) if w.name == "Fp8Linear down, T = 3")
    default = default_tile(call, GPU)
    wrong = replace(default, stages=default.stages - 1)

    def execute(work: work.Work, inputs: Sequence[torch.Tensor], tile: Tile, gpu: Gpu) -> Sequence[torch.Tensor]:
        outputs = interpret(work, inputs, tile, gpu)
        return [x * 2 for x in outputs] if tile == wrong else outputs

    monkeypatch.setattr(measure, "execute", execute)
    near = [default, wrong, replace(default, k=64, stages=default.stages - 1)]
    monkeypatch.setattr(tuner, "candidates", lambda name, tile: iter(near))
    rows, left = tuner.tune([Task("8", (call,))], MACHINE, lambda: False, lambda _: None)
    assert [(row.tile, row.profile, row.sms) for row in rows] == [(near[2], "8", 2)]
    assert (dict(rows[0].sizes)["N"], left) == (call.dims["N"], [])
    assert tuner.tune([Task("8", (call,))], MACHINE, lambda: True, lambda _: None)[1] != []
    kept: list[int] = []
    twice = [Task("8", (call,)), Task("64", (call,))]
    tuner.tune(twice, MACHINE, lambda: False, lambda _: None, lambda known: kept.append(len(known)))
    assert kept == [1, 2]  # a run that is killed keeps what it found
    said: list[str] = []
    broken = lambda *_: (_ for _ in ()).throw(OSError("no gcc"))  # noqa: E731
    monkeypatch.setattr(tuner, "time_tiles", broken)
    assert tuner.tune(twice, MACHINE, lambda: False, said.append) == ([], twice)
    assert any("OSError: no gcc" in line for line in said)
    assert best_row(Task("8", (call,)), {default: 1.0, near[2]: 0.99}, MACHINE) is None
    monkeypatch.setattr(tuner, "tune", lambda *_: (rows, []))
    monkeypatch.setattr(run, "find_machine", lambda facts: MACHINE)
    monkeypatch.setattr(bench_kernels, "require_gpu", lambda command: None)
    for _ in range(2):  # a second time the file exists
        result = CliRunner().invoke(main, ["bench", "kernels", "--tune", "--tuning", str(tmp_path / "t.json")])
        assert result.exit_code == 0, result.output
        assert read_rows(tmp_path / "t.json") == tuple(rows)


def test_candidates_are_few_and_within_limits() -> None:
    """Only what may change without changing results, the default first, none twice."""
    for task in tasks(run.full_config()):
        name = task.works[0].operator.name
        default = default_tile(task.works[0], Gpu("sm_90", 132))
        found = list(candidates(name, default))
        assert found[0] == default
        assert len(found) == len(set(found)) <= 20
        for tile in found[1:]:
            changed = {f for f in ("m", "n", "k", *LIMITS) if getattr(tile, f) != getattr(default, f)}
            assert changed
            assert changed <= set(FREE[name])
            assert all(LIMITS[f][0] <= getattr(tile, f) <= LIMITS[f][1] for f in changed)


def test_tiles_that_spill_or_are_too_large_are_not_used() -> None:
    assert usable(GOOD, "8")
    assert not usable(replace(GOOD, spills=1), "8")
    assert not usable(replace(GOOD, problem="no"), "8")
    for profile in ("8", "64", "256"):
        assert usable(replace(GOOD, shared=49152), profile) and not usable(replace(GOOD, shared=49153), profile)
    assert usable(replace(GOOD, shared=227 * 1024), "prefill")
    assert not usable(replace(GOOD, shared=228 * 1024), "prefill")


def test_what_cannot_be_compiled_is_told() -> None:
    """Here kernels are interpreted: that is the problem which is reported, not raised."""
    call = work.works(check_config(), (1,), ())[0]
    tile = default_tile(call, GPU)
    assert "cannot be compiled" in compile_tile(call, tile, "sm_90").problem
    named = warm._compile_named(call.operator.name, dict(call.dims), dict(call.attributes), tile, "sm_90")
    assert "cannot be compiled" in named.problem


@pytest.mark.parametrize("options", [[], ["--tune"], ["--json", "x.json"]])
def test_without_a_gpu_one_sentence_says_so(
    options: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpus, "find_gpu", lambda index=0: None)
    result = CliRunner().invoke(main, ["bench", "kernels", *options])
    assert result.exit_code == 1
    assert "no NVIDIA GPU" in result.output
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_what_else_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that torch cannot use, a machine without triton, an operator that does not exist."""
    monkeypatch.setattr(gpus, "find_gpu", lambda index=0: GpuFacts("NVIDIA H20", "sm_90", 78, 10**11, "580"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "cannot use the NVIDIA H20" in CliRunner().invoke(main, ["bench", "kernels"]).output
    monkeypatch.setattr(gpu_needed, "find_spec", lambda name: None if name == "triton" else True)
    assert "needs triton" in CliRunner().invoke(main, ["bench", "kernels"]).output
    result = CliRunner().invoke(main, ["bench", "kernels", "--operator", "Nothing"])
    assert result.exit_code == 2
    assert "no operator 'Nothing'" in result.output
