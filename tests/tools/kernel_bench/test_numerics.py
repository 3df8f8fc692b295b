"""The numerics of `bench kernels` on a CPU: plain torch against function bodies, and kernels in the interpreter."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from support.interpreter import exact_interpreter, run_interpreted

from angelforge.errors import AngelForgeError
from angelforge.plugins.device.streaming import read_all
from angelforge.plugins.kernel import Gpu, Tile
from angelforge.plugins.tensorrt.kernels import find_kernel
from angelforge.tools.kernel_bench import truth
from angelforge.tools.kernel_bench.checks import check_against_body, check_config, check_works
from angelforge.tools.kernel_bench.compare import compare
from angelforge.tools.kernel_bench.execution import copies
from angelforge.tools.kernel_bench.inputs import experts_used, make_inputs
from angelforge.tools.kernel_bench.measure import default_tile
from angelforge.tools.kernel_bench.plain import plain_outputs
from angelforge.tools.kernel_bench.truth import by_body, by_torch, to_numpy, to_torch
from angelforge.tools.kernel_bench.work import Sequences, Work, works

SMALL = Gpu("sm_90", 2)
CONTEXT = Sequences("mixed", ((300, 1), (0, 0), (20, 12)))
WORKS = works(check_config(), (5,), (CONTEXT,))


def find(name: str) -> Work:
    return next(work for work in WORKS if work.operator.name == name)


def interpret(work: Work, inputs: Sequence[torch.Tensor], tile: Tile) -> Sequence[torch.Tensor]:
    """`checks.Execute` without a GPU."""
    return run_interpreted(find_kernel(work.operator), copies(work, inputs), work.attributes, gpu=SMALL, tile=tile)


@pytest.mark.parametrize("work", WORKS, ids=lambda work: f"{work.operator.name}-{work.label}")
def test_plain_torch_is_the_body(work: Work) -> None:
    """Two descriptions of every operator, written apart, agree; so a kernel may be compared with either."""
    inputs = make_inputs(work, 3, "cpu")
    body, plain = by_body(work, inputs), by_torch(work, inputs)
    assert plain is not None
    found = body if work.operator.name == "PagedAttention" else plain
    wanted = plain if work.operator.name == "PagedAttention" else body
    verdict = compare(work.operator, inputs, work.attributes, found, wanted)
    assert verdict.ok
    assert verdict.error < verdict.limit / 3


@pytest.mark.parametrize("name", ["MoECombine", "Fp8Linear", "MoERoute", "AddNormQuantize", "Fp8GateUp"])
def test_kernels_pass_the_check(name: str) -> None:
    """The very functions that run on a GPU, over the interpreter: kernel against body on fresh inputs."""
    work, tile = next((w, t) for w, t in check_works(SMALL, (name,)) if w.tokens == 5)
    check = check_against_body(work, tile, interpret, seed=4, device="cpu")
    assert check.verdict.ok


@pytest.mark.full
@pytest.mark.parametrize("name", ["Embedding", "AddNormQuantize", "QKVPrepare", "MoELogits", "MoECombine"])
def test_rows_of_8192_tokens(name: str) -> None:
    """What is done row by row, in the tile of prompts: every row is right, the worst one counts."""
    work = next(w for w in works(check_config(), (8192,), ()) if w.operator.name == name)
    inputs = make_inputs(work, 3, "cpu")
    found = interpret(work, inputs, default_tile(work, SMALL))
    wanted = by_torch(work, inputs) or by_body(work, inputs)
    assert compare(work.operator, inputs, work.attributes, found, wanted).ok


@pytest.mark.parametrize("name", ["Fp8Linear", "Fp8MoEGateUp", "AddNormQuantize", "Linear", "PagedAttention"])
def test_one_wrong_row_is_seen(name: str) -> None:
    """A single row of the last output that counts is scaled, zeroed or NaN."""
    work = find(name)
    inputs = make_inputs(work, 5, "cpu")
    wanted = by_body(work, inputs)
    for factor in (1.1, 0.0, float("nan")):
        found = [x.clone() for x in wanted]
        place = found[0] if name == "PagedAttention" else found[-1]
        place.view(-1, place.shape[-1])[-1 if name != "PagedAttention" else 0] *= factor
        assert not compare(work.operator, inputs, work.attributes, found, wanted).ok


def test_wrong_choices_are_seen() -> None:
    """Another expert, another weight, or bits that contradict the ids; the order of equal experts is free."""
    work = find("MoERoute")
    inputs = make_inputs(work, 6, "cpu")
    ids, weights, bits = by_body(work, inputs)
    swapped = ids.clone()
    swapped[0, [0, 1]] = ids[0, [1, 0]]
    assert compare(work.operator, inputs, work.attributes, (swapped, weights, bits), (ids, weights, bits)).ok
    other, heavier, wrong = ids.clone(), weights.clone(), bits.clone()
    other[0, 0] = next(e for e in range(32) if e not in ids[0].tolist())
    heavier[1, 1] *= 1.001
    wrong[3, 0] ^= 1
    for found in ((other, weights, bits), (ids, heavier, bits), (ids, weights, wrong)):
        assert not compare(work.operator, inputs, work.attributes, found, (ids, weights, bits)).ok


def test_inputs_are_what_a_scheduler_hands_over() -> None:
    """Different experts for each token with the shared one last, slots beyond page 0, pages used once."""
    work = find("Fp8MoEGateUp")
    inputs = make_inputs(work, 7, "cpu")
    ids = inputs[-2]
    assert all(len(set(row)) == len(row) for row in ids.tolist())
    assert set(ids[:, -1].tolist()) == {32}
    assert experts_used(work, inputs) == len(set(ids.flatten().tolist()))
    slots = make_inputs(find("QKVPrepare"), 7, "cpu")[6]
    assert int(slots.min()) >= 64
    table = make_inputs(find("PagedAttention"), 7, "cpu")[2]
    used = [*table[0, :5].tolist(), table[2, 0].item()]
    assert sorted(used) == [1, 2, 3, 4, 5, 6]


def test_inputs_are_fresh_and_repeatable() -> None:
    work = find("Linear")
    first, again, other = (make_inputs(work, seed, "cpu") for seed in (1, 1, 2))
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])
    assert make_inputs(work, 3, "cpu", {"weight": first[1]})[1] is first[1]


def test_arrays_keep_their_bits() -> None:
    for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float32, torch.int32):
        tensor = torch.arange(-4, 5).to(dtype)
        assert torch.equal(to_torch(to_numpy(tensor)).view(torch.uint8), tensor.view(torch.uint8))


def test_unknown_operators_have_no_plain_form() -> None:
    assert plain_outputs("MoERoute", {}, {}) is None


def test_the_streaming_kernel_reads_everything() -> None:
    """Each int32 is summed once, however many programs share the blocks."""
    source = torch.from_numpy(np.random.default_rng(0).integers(-99, 99, 64 * 11).astype(np.int32))
    for programs in (1, 3, 20):
        sums = torch.zeros(programs, dtype=torch.int32)
        with exact_interpreter([source], [sums]):
            read_all[(programs,)](source, 11, sums, block=64)
        assert int(sums.sum()) == int(source.sum())


def test_a_body_that_does_not_run_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """An old ONNX Runtime, say: a message for this kernel, not the end of a run."""

    def refuse(*_: object) -> None:
        raise RuntimeError("no FP8 here")

    monkeypatch.setattr(truth, "run_body", refuse)
    with pytest.raises(AngelForgeError, match="body of Fp8Linear does not run on this machine"):
        by_body(find("Fp8Linear"), make_inputs(find("Fp8Linear"), 1, "cpu"))
