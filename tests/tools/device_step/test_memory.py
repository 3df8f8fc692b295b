"""What fits a GPU, what a step must read, and that both are counted before anything is allocated."""

import re

import pytest

from angelforge.config import ModelConfig
from angelforge.engines.decode_limit import touched_experts
from angelforge.errors import AngelForgeError
from angelforge.exporter.graph import build_graph
from angelforge.exporter.synthetic_config import FULL_CONFIG
from angelforge.precision import Precision
from angelforge.tools.device_step.memory import PAGE_SIZE, RESERVE, Subject, fit
from angelforge.tools.device_step.model import step_bytes
from angelforge.tools.device_step.sequences import Case, decode_batch
from angelforge.tools.device_step.weights import empty_weights, nbytes

FULL = ModelConfig.from_dict(FULL_CONFIG)
SUBJECT = Subject(FULL, Precision.FP8, 131072)
CASES = [Case(batch, context) for batch in (1, 32) for context in (1024, 131072)]
H20, H200 = 101_000_000_000, 149_000_000_000  # bytes that are free


def test_an_h200_holds_all_but_32_long_sequences() -> None:
    found = fit(SUBJECT, CASES, H200)
    assert found.cases == tuple(CASES[:3])
    [(case, reason)] = found.left_out
    assert case == Case(32, 131072)
    match = re.fullmatch(
        r"needs (3\d\d\.\d) GB of the GPU's memory, of which 149\.0 GB are free; --layers (\d+) fits, or .*", reason
    )
    assert match
    layers = int(match[2])
    sizes = [Subject(FULL.with_layers(n), Precision.FP8, 131072).needed_bytes([case]) for n in (layers, layers + 1)]
    assert sizes[0] <= H200 < sizes[1]


def test_an_h20_holds_none_and_is_told_how_many_layers() -> None:
    with pytest.raises(AngelForgeError, match=r"A step of batch 1 at 1K needs 10\d\.\d GB .* --layers (29|30) fits\."):
        fit(SUBJECT, CASES, H20)
    with pytest.raises(AngelForgeError, match="no number of layers fits"):
        fit(SUBJECT, CASES, 10**9)


def test_what_is_counted_is_what_is_allocated() -> None:
    """Weights to the byte, and the pool; by operator the buffers of all layers are kept."""
    case = Case(32, 4096)
    weights = nbytes(empty_weights(build_graph(FULL, Precision.FP8, PAGE_SIZE, 131072), "meta"))
    pool = case.pages(PAGE_SIZE) * PAGE_SIZE * 65536
    assert case.pages(PAGE_SIZE) == 32 * 64 + 1
    assert 0 < SUBJECT.needed_bytes([case]) - weights - pool - RESERVE < 2e9
    each = Subject(FULL, Precision.FP8, 131072, by_operator=True)
    assert each.needed_bytes([case]) > SUBJECT.needed_bytes([case]) + 20 * 2**27


@pytest.mark.parametrize(
    ("batch", "context", "gigabytes"), [(1, 1024, 6.26), (1, 131072, 14.8), (32, 1024, 68.9), (32, 4096, 75.4)]
)
def test_bytes_of_a_step_are_those_of_the_physical_limit(batch: int, context: int, gigabytes: float) -> None:
    """PLATFORM.md's table, which leaves out scales and has the router in bf16, at the expected number of experts."""
    expected = [touched_experts(FULL, batch)] * 31
    found = step_bytes(SUBJECT, Case(batch, context), expected)  # type: ignore[arg-type]
    assert found / 1e9 == pytest.approx(gigabytes, rel=1.2e-2)
    fewer = step_bytes(SUBJECT, Case(batch, context), [0] * 31)
    assert found - fewer == pytest.approx(31 * expected[0] * 12.586e6, rel=1e-3)


@pytest.mark.parametrize(("batch", "context"), [(1, 1), (3, 64), (5, 200), (32, 1024)])
def test_packed_steps_keep_the_contract(batch: int, context: int) -> None:
    """Ids of the vocabulary, pages used once, slots that agree with them; seeds repeat."""
    case = Case(batch, context)
    packed = decode_batch(FULL, case, PAGE_SIZE, 7)
    packed.check(FULL.vocab_size, PAGE_SIZE, case.pages(PAGE_SIZE), context)
    assert packed.kv_length.tolist() == [context] * batch
    assert len(set(packed.page_table.flatten().tolist())) == packed.page_table.size
    assert (decode_batch(FULL, case, PAGE_SIZE, 7).page_table == packed.page_table).all()
