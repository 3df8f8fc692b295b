"""Other engines' kernels in `bench kernels`: what the bench hands them, and what it does with what comes back."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from support import engines_in_torch as stand_ins

from angelforge.plugins.kernel import Gpu
from angelforge.tools.kernel_bench.capture import CaptureError
from angelforge.tools.kernel_bench.checks import check_config
from angelforge.tools.kernel_bench.costs import cost_of
from angelforge.tools.kernel_bench.inputs import make_inputs
from angelforge.tools.kernel_bench.measure import Machine, Measurement, default_tile
from angelforge.tools.kernel_bench.rivals import beside
from angelforge.tools.kernel_bench.rivals.beside import ENGINES, Rivals, difference
from angelforge.tools.kernel_bench.rivals.layouts import contiguous_rows, masked_rows, page_lists
from angelforge.tools.kernel_bench.rivals.rival import Engine, Prepare, Rival, Shared
from angelforge.tools.kernel_bench.statistics import Timing
from angelforge.tools.kernel_bench.truth import by_body, by_torch
from angelforge.tools.kernel_bench.work import Sequences, Work, works

DECODE = Sequences("decode", ((299, 1), (63, 1), (5, 1)))
MIXED = Sequences("mixed", ((70, 3), (0, 65)))
# 1 and 5 tokens touch few experts; 130 all of them, and take DeepGEMM's other layout.
WORKS = [w for w in works(check_config(), (1, 5), (DECODE, MIXED)) if w.label not in ("qkv", "dense", "head")]
WORKS += [w for w in works(check_config(), (130,), ()) if w.operator.name.startswith(("Fp8MoE", "MoERoute"))]
CASES = [
    pytest.param(engine, prepare, work, id=f"{engine.name}-{prepare.__name__}-{work.label}-{work.tokens}")
    for engine in ENGINES
    for work in WORKS
    for prepare in engine.kernels.get(work.operator.name, ())
]
MACHINE = Machine("NVIDIA H200", Gpu("sm_90", 2), None, 4.3e12, device="cpu")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins.install(monkeypatch)


def outputs_of(work: Work, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """What our kernel gives, from the function body or plain torch, which other tests show to agree."""
    found = by_body(work, inputs) if work.operator.name == "PagedAttention" else by_torch(work, inputs)
    return by_body(work, inputs) if found is None else found


def bind(engine: Engine, prepare: Prepare, work: Work, inputs: Sequence[torch.Tensor]) -> Rival:
    named = dict(zip((port.name for port in work.operator.inputs), inputs, strict=True))
    return prepare(engine.load(), work, named, Shared({}))


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(("engine", "prepare", "work"), CASES)
def test_layouts_are_those_that_the_engines_document(engine: Engine, prepare: Prepare, work: Work) -> None:
    """Plain torch on the documented layouts gives the operator's outputs; an output that is a little off is seen."""
    inputs = make_inputs(work, 3, "cpu")
    ours = [x.clone() for x in outputs_of(work, inputs)]
    before = [x.clone() for x in inputs]
    rival = bind(engine, prepare, work, inputs)
    rival.call()
    verdict = difference(work, inputs, ours, rival)
    assert verdict.ok, verdict
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(inputs, before, strict=True))
    place = next(i for i, x in enumerate(rival.outputs()) if x is not None)
    if work.operator.name == "MoERoute":
        ours[place][:, 0] = torch.where(ours[place][:, 0] == 0, 1, 0)
    elif ours[place].dtype == torch.float8_e4m3fn:
        ours[place + 1][-1] *= 1.1
    else:
        ours[place].view(-1, ours[place].shape[-1])[0] *= 1.1
    assert not difference(work, inputs, ours, rival).ok


def test_rows_of_experts() -> None:
    """Both layouts of DeepGEMM: every entry has a row of its own in its expert's part."""
    ids = torch.tensor([[3, 0], [3, 1], [0, 3]], dtype=torch.int32)
    rows, counts, most = masked_rows(ids, 5, 4)
    assert (counts.tolist(), most) == ([2, 1, 0, 3, 0], 4)
    assert rows.tolist() == [12, 0, 13, 4, 1, 14]
    rows, expert = contiguous_rows(ids, 5, 4)
    assert expert.tolist() == [0, 0, -1, -1, 1, -1, -1, -1, 3, 3, 3, -1]
    assert expert[rows].tolist() == ids.flatten().tolist()
    assert len(set(rows.tolist())) == 6


def test_pages_of_sequences() -> None:
    """Whole and begun pages, and a sequence without keys."""
    table = torch.tensor([[7, 9, 0], [4, 5, 6], [0, 0, 0]], dtype=torch.int32)
    indptr, indices, last = page_lists(table, torch.tensor([65, 192, 0]), 64)
    assert (indptr.tolist(), indices.tolist(), last.tolist()) == ([0, 2, 5, 5], [7, 9, 4, 5, 6], [1, 64, 0])


def measurement(name: str) -> Measurement:
    work = next(w for w in WORKS if w.operator.name == name and (w.tokens == 5 or w.sequences is not None))
    timing, cost = Timing(6.0, 6.0, 0.0), cost_of(work)
    return Measurement(
        work, default_tile(work, MACHINE.gpu), cost, timing, None, None, None, None, 0.1, None, None, None
    )


@pytest.fixture
def bodies(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bodies take our kernels' place, every call takes 12 µs; the list tells how many calls were timed together."""
    timed: list[int] = []

    def clock(calls: Sequence[Any]) -> Timing:
        timed.append(len(calls))
        return Timing(12.0, 12.0, 0.0)

    monkeypatch.setattr(beside, "execute", lambda work, inputs, tile, gpu: outputs_of(work, inputs))
    monkeypatch.setattr(beside, "time_calls", clock)
    return timed


@pytest.mark.usefixtures("installed")
def test_a_row_for_every_kernel(bodies: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Right results are timed, over all sets of inputs; the table and JSON have the ratio and the versions."""
    monkeypatch.setattr(sys.modules["vllm"], "__version__", "0.33.0", raising=False)
    large = measurement("Norm")
    large = replace(large, cost=replace(large.cost, nbytes=2**27))  # two sets, so that no cache holds them
    found = Rivals().all_beside([large, measurement("Fp8MoEDown")], MACHINE, lambda: False, 1)
    assert [(row.engine, row.kernel) for row in found.rows] == [
        ("vLLM", "rms_norm"), ("FlashInfer", "rmsnorm"),
        ("DeepGEMM", "m_grouped_fp8_gemm_nt_masked"), ("vLLM", "fused_moe_kernel"),
    ]  # fmt: skip
    assert bodies == [2, 2, 1, 1]
    assert all((row.problem, row.microseconds, row.ratio) == ("", 12.0, 0.5) for row in found.rows)
    raw = found.to_dict()
    assert [row["ratio"] for row in raw["rows"]] == [0.5] * 4
    assert raw["versions"] == {"DeepGEMM": "?", "vLLM": "0.33.0", "FlashInfer": "?"}
    table = "\n".join(found.markdown())
    assert "| Norm, T = 5 | vLLM rms_norm | 12.0 | 6.0 | 0.50 |" in table
    late = Rivals().all_beside([large], MACHINE, lambda: True, 1)
    assert (late.rows, late.left) == ([], ["Norm, T = 5"])
    assert "No time was left for 1 calls: Norm, T = 5" in "\n".join(late.markdown())


@pytest.mark.usefixtures("installed", "bodies")
def test_attention_counts_with_its_merge() -> None:
    """Others join their parts in the same call."""
    attention, merge = measurement("PagedAttention"), measurement("AttentionMerge")
    merge = replace(merge, work=replace(merge.work, label=attention.work.label), timing=Timing(3.0, 3.0, 0.0))
    for measured, ours, said in (([attention, merge], 9.0, "ours with AttentionMerge"), ([attention], 6.0, "without")):
        rows = Rivals().all_beside(measured, MACHINE, lambda: False, 1).rows
        assert [row.engine for row in rows] == ["vLLM", "FlashInfer"]
        assert all(row.ours == ours and said in row.note for row in rows)
        assert all(row.ratio == ours / 12 for row in rows)


def broken(error: Exception) -> Any:
    def function(*_: Any, **__: Any) -> None:
        raise error

    return function


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    "error",
    [RuntimeError("no kernel image | for sm_90\nmore"), AssertionError(), TypeError("takes 3 arguments"), OSError("x")],
)
def test_what_raises_or_differs_is_a_row_and_is_not_timed(
    error: Exception, bodies: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One kernel raises, another gives other numbers, a third lacks a function; the fourth is timed all the same."""
    monkeypatch.setattr(sys.modules["vllm._custom_ops"], "rms_norm", broken(error))
    monkeypatch.setattr(sys.modules["flashinfer"], "rmsnorm", lambda x, weight, eps, out: out.copy_(x))
    monkeypatch.delattr(sys.modules["deep_gemm"], "m_grouped_fp8_gemm_nt_masked")
    found = Rivals().all_beside([measurement("Norm"), measurement("Fp8MoEDown")], MACHINE, lambda: False, 1)
    first, second, third, fourth = found.rows
    text = "no kernel image / for sm_90" if isinstance(error, RuntimeError) else str(error)
    assert first.problem.startswith(f"not run: {type(error).__name__}")
    assert text in first.problem and "\n" not in first.problem
    assert second.problem.startswith("differs: normed by ")
    assert "not run: AttributeError" in third.problem
    assert [row.microseconds for row in found.rows] == [None, None, None, 12.0]
    assert (fourth.problem, bodies) == ("", [1])
    assert {line.count("|") for line in found.markdown()[3:]} == {8}  # one table, whatever stands in a message


@pytest.mark.usefixtures("installed")
def test_rows_after_a_failed_capture_are_suspect(bodies: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The first error of the capture stands in the row; after each call all rows so far are saved."""

    def clock(calls: Sequence[Any]) -> Timing:
        if not bodies:
            bodies.append(len(calls))
            raise CaptureError("It cannot be captured in a CUDA graph: TypeError: odd")
        return Timing(12.0, 12.0, 0.0)

    monkeypatch.setattr(beside, "time_calls", clock)
    saved: list[int] = []
    calls = [measurement("Norm"), measurement("AddNorm")]
    found = Rivals().all_beside(calls, MACHINE, lambda: False, 1, save=lambda known: saved.append(len(known.rows)))
    assert found.rows[0].problem == "not run: It cannot be captured in a CUDA graph: TypeError: odd"
    assert found.rows[1].microseconds == 12.0
    assert "The capture of vLLM rms_norm at Norm, T = 5 failed: figures of the rows below it" in "\n".join(
        found.markdown()
    )
    assert found.to_dict()["suspect_after"] == "vLLM rms_norm at Norm, T = 5"
    assert replace(found, rows=found.rows[:1]).suspect_after is None
    assert replace(found, rows=found.rows[1:]).suspect_after is None
    assert saved == [2, len(found.rows)]


@pytest.mark.usefixtures("installed", "bodies")
def test_a_lost_gpu_ends_the_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was found before stays, what would follow is not tried."""
    monkeypatch.setattr(sys.modules["flashinfer"], "rmsnorm", broken(RuntimeError("illegal memory access")))
    monkeypatch.setattr(beside, "answers", lambda device: False)
    found = Rivals().all_beside([measurement("Norm"), measurement("AddNorm")], MACHINE, lambda: False, 1)
    assert [row.kernel for row in found.rows] == ["rms_norm", "rmsnorm"]
    assert "did not answer after FlashInfer rmsnorm at Norm, T = 5" in "\n".join(found.markdown())


def test_without_the_packages_a_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not installed, and installed but not importable: neither raises."""
    absent = Engine("Nothing", ("a_package_that_is_not_there", "angelforge.no.such"), {})
    bad = ModuleType("half_a_package")
    monkeypatch.setitem(sys.modules, "half_a_package", bad)  # without a spec, as after a failed import
    found = Rivals((absent, replace(absent, name="Half", packages=("half_a_package",))))
    assert (found.loaded, found.absent, found.broken) == ([], ["Nothing", "Half"], [])
    monkeypatch.setattr(Engine, "installed", lambda self: "angelforge.not_there")
    found = Rivals((absent,))
    reason = "ModuleNotFoundError: No module named 'angelforge.not_there'"
    assert found.broken == [f"Nothing is not run: it does not load ({reason})"]
    table = "\n".join(found.all_beside([], MACHINE, lambda: False, 1).markdown())
    assert "- Nothing is not run: it does" in table
