"""`angelforge bench sampling` finds wrong tokens, and its table says what there is; its kernels are launched right."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from angelforge.runtime.device_kernels import KernelWork
from angelforge.runtime.device_torch import TorchWork
from angelforge.runtime.device_work import Draws, SeenRows, Work
from angelforge.runtime.sampling import SamplingParams
from angelforge.tools import sampling_report
from angelforge.tools.kernel_bench.capture import CaptureError
from angelforge.tools.kernel_bench.statistics import Timing
from angelforge.tools.sampling_bench import KINDS, MARGIN, check, chosen
from angelforge.tools.sampling_report import Report, measure_all

VOCAB, CPU = 3000, torch.device("cpu")


class Wrong(KernelWork):
    """Forgets top-p, and what was penalised."""

    def choose(self, logits: torch.Tensor, draws: Draws) -> torch.Tensor:
        rules = draws.rules.clone()
        rules[:, 2] = 1.0
        return super().choose(logits, draws._replace(rules=rules))

    def penalize(self, logits: torch.Tensor, seen: SeenRows) -> None:
        logits[:, 0] += 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_kernels_are_right_and_a_mistake_is_told(kind: str) -> None:
    """In Triton's interpreter, against the host."""
    with np.errstate(all="ignore"):
        assert check(KernelWork(), kind, 2, VOCAB, CPU, 1) == []
        told = check(Wrong(), kind, 6, VOCAB, CPU, 1)
    assert any("penalties" in each for each in told) == ("penalties" in kind)
    if kind == "top-p 0.95 of a flat row":
        assert any("the host draws" in each for each in told)


def test_another_token_of_a_flat_row_is_told() -> None:
    """Though each of its many tokens weighs less than what rounding may decide."""
    logits, params = np.zeros(157_184, np.float32), SamplingParams(temperature=1.0, top_p=0.95)
    wanted, distance = chosen(logits, params, 0.5, 74_662)
    assert (wanted, distance) == (74_662, 0.0)
    assert chosen(logits, params, 0.5, 74_663)[1] < MARGIN  # the next one
    for token in (74_600, 74_700, 157_183, -1):
        assert chosen(logits, params, 0.5, token)[1] > MARGIN


def test_a_run_measures_every_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is known is saved after each; a kind that takes too long at 32 rows is named, and what is wrong."""
    times = iter(range(10, 1000))

    def time_calls(calls: Sequence[Callable[[], None]]) -> Timing:
        for call in calls:
            call()
        return Timing(float(next(times)), 1.0, 0.1)

    monkeypatch.setattr(sampling_report, "time_calls", time_calls)
    monkeypatch.setattr(sampling_report, "KINDS", dict(list(KINDS.items())[:2]))
    monkeypatch.setattr(sampling_report, "ROWS", (1, 32))
    saved: list[Report] = []
    with np.errstate(all="ignore"):
        report = measure_all("a GPU", CPU, 40, 1, lambda text: None, saved.append)
    assert [len(each.figures) for each in saved] == [1, 2, 3, 4]
    assert saved[-1] == report
    assert "| greedy | 32 | 12.0 | 10% | 13 (1.1 ×) | yes |" in report.markdown()
    assert "Goal at 32 rows, 50 µs: met by all that ran." in report.markdown()
    monkeypatch.setattr(sampling_report, "KernelWork", Wrong)
    times = iter(range(60, 1000))
    with np.errstate(all="ignore"):
        late = measure_all("a GPU", CPU, 40, 1, lambda text: None, saved.append)
    assert "missed: greedy, temperature 1." in late.markdown()
    assert late.to_dict()["figures"][0]["ours"]["median"] == 60.0


class Failing(KernelWork):
    """Cannot draw, only take the largest."""

    def choose(self, logits: torch.Tensor, draws: Draws) -> torch.Tensor:
        if draws.rules[0, 0] > 0:
            raise RuntimeError("an illegal instruction\nwas encountered")
        return super().choose(logits, draws)


@pytest.mark.parametrize("alive", [True, False])
def test_what_fails_is_told_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch, alive: bool) -> None:
    """As long as the GPU answers; what torch cannot do is no fault."""

    def time_calls(works: Sequence[Work]) -> Timing:
        if isinstance(works[0], TorchWork):
            raise CaptureError("It cannot be captured")
        return Timing(10.0, 9.0, 0.1)

    monkeypatch.setattr(sampling_report, "work_of_a_step", lambda rules, rows, vocab, device, work: work)
    monkeypatch.setattr(sampling_report, "time_calls", time_calls)
    monkeypatch.setattr(sampling_report, "KernelWork", Failing)
    monkeypatch.setattr(sampling_report, "answers", lambda device: alive)
    monkeypatch.setattr(sampling_report, "ROWS", (1,))
    monkeypatch.setattr(sampling_report, "check_round", lambda work, vocab, device, seed: ["a mask: wrong"])
    said: list[str] = []
    with np.errstate(all="ignore"):
        report = measure_all("a GPU", CPU, 40, 1, said.append, lambda known: None)
    assert [each.rules for each in report.figures] == ["greedy"]
    assert "| greedy | 1 | 10.0 | 10% | not run | yes |" in report.markdown()
    failed = [kind for kind in KINDS if kind != "greedy"][: None if alive else 1]
    assert list(report.problems) == [
        "a mask: wrong",
        *(f"{kind}, 1 rows: RuntimeError: an illegal instruction" for kind in failed),
    ]
    assert "As torch operations: It cannot be captured" in said


def test_a_launch_that_looks_nothing_up_is_tritons_own() -> None:
    """All seven kernels and forms, compiled in a process without Triton's interpreter, launched on nothing."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
    command = [sys.executable, "-m", "support.launched_again"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert (result.returncode, result.stdout) == (0, "8\n"), result.stderr
