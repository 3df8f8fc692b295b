"""Several ranks compute what one does: processes of their own, joined by gloo, on one bundle; and end when one does."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from support.built import relative_error
from support.http_server import wait_until
from support.rank_program import compute
from support.ranks import finish_ranks, start_ranks

from angelforge import LLM
from angelforge.bundle import Bundle
from angelforge.engines.cpu import build_cpu
from angelforge.exporter.export import ExportOptions, export
from angelforge.exporter.rank_graph import add_rank_graph
from angelforge.exporter.synthetic import small_config, write_checkpoint
from angelforge.exporter.synthetic_draft import small_draft_config, write_draft
from angelforge.precision import Precision
from angelforge.tools.toy import DRAFT, MODEL

SECONDS = 120  # a machine may be busy; the ranks take a few


def build(bundle: Bundle, *ranks: int) -> Bundle:
    """A bundle built for one rank and for several."""
    build_cpu(bundle)
    for count in ranks:
        bundle = add_rank_graph(bundle, count)
        build_cpu(bundle, count)
    return bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The toy and its draft. It has two key/value heads: four ranks hold each of them twice."""
    folder = tmp_path_factory.mktemp("ranks") / "bundle"
    return build(export(str(MODEL), folder, ExportOptions(draft=str(DRAFT))), 2, 4)


def single(bundle: Bundle) -> dict[str, np.ndarray]:
    with LLM(bundle.folder, kv_memory=40_000_000, threads=1) as llm:
        return compute(llm)


def shared(bundle: Bundle, ranks: int, result: Path) -> dict[str, np.ndarray]:
    """What rank 0 of several computes; the others are silent, and all end well."""
    found = finish_ranks(start_ranks(ranks, ["generate", bundle.folder, result]), SECONDS)
    assert found == [(0, "", "")] * ranks
    with np.load(result) as saved:
        return dict(saved)


def check(bundle: Bundle, ranks: int, result: Path) -> None:
    """Ranks compute what one does: logits but for the order of sums, and exactly the same greedy tokens."""
    found, expected = shared(bundle, ranks, result), single(bundle)
    assert found["logits"].shape == expected["logits"].shape == (70, 1024)
    assert relative_error(found["logits"], expected["logits"]) < 1e-5
    assert np.array_equal(found["tokens"], expected["tokens"])
    assert found["proposed"] == expected["proposed"] > 0


def test_four_ranks_compute_what_one_does(bundle: Bundle, tmp_path: Path) -> None:
    """A sequence longer than a page, and a batch whose tokens a draft proposes."""
    check(bundle, 4, tmp_path / "result.npz")


def test_fp8_ranks_compute_what_one_does(tmp_path: Path) -> None:
    """Scales are cut with their blocks; the FP8 draft is whole. Sums of parts are f32, as all that a CPU computes."""
    sizes = {"head_dim": 128, "num_attention_heads": 4, "moe_intermediate_size": 256, "num_hidden_layers": 2}
    checkpoint = write_checkpoint(tmp_path / "checkpoint", small_config(**sizes), dtype="F32")
    config = small_draft_config(small_config(**sizes), eagle_config={"eagle_aux_hidden_state_layer_ids": [0, 1]})
    draft = write_draft(tmp_path / "draft", checkpoint, config)
    options = ExportOptions(precision=Precision.FP8, draft=str(draft))
    bundle = build(export(str(checkpoint), tmp_path / "bundle", options), 2)
    onnx.checker.check_model(str(bundle.folder / "model.tp2.onnx"), full_check=True)  # other tools read it, too
    found, expected = shared(bundle, 2, tmp_path / "result.npz"), single(bundle)
    assert relative_error(found["logits"], expected["logits"]) < 1e-2  # one step of e4m3 somewhere is 6 %
    # The first rows, before any value of theirs has come to lie on another side of a step.
    assert relative_error(found["logits"][:4], expected["logits"][:4]) < 1e-5
    assert found["proposed"] > 0


def test_a_killed_rank_ends_the_group_and_is_named(bundle: Bundle, tmp_path: Path) -> None:
    """Within ten seconds: requests in flight get an error, rank 0 ends by itself. Started again, two ranks work."""
    ready = tmp_path / "ready"
    processes = start_ranks(2, ["hold", bundle.folder, ready])
    wait_until(ready.exists, SECONDS)
    time.sleep(0.5)  # into the first steps
    killed = time.time()
    os.kill(processes[1].pid, signal.SIGKILL)
    (code, output, errors), (killed_code, _, _) = finish_ranks(processes, SECONDS)
    reason, *message, noticed = output.split()
    assert (code, reason, errors, killed_code) == (0, "error", "", -signal.SIGKILL)
    assert " ".join(message) == f"Rank 1 ({processes[1].pid}) has died. The 2 ranks have ended; start them again."
    assert float(noticed) - killed < 10
    check(bundle, 2, tmp_path / "result.npz")


@pytest.mark.full
@pytest.mark.parametrize(
    ("ranks", "victim", "blow", "told"),
    [
        (4, 2, signal.SIGKILL, "Rank 2 ({}) has died."),
        (2, 1, signal.SIGSTOP, "Rank 1 ({}) has given no sign of life."),
    ],
)
def test_who_is_named(bundle: Bundle, ranks: int, victim: int, blow: int, told: str, tmp_path: Path) -> None:
    """The one that died, not those that ended because of it; and one that hangs, which is killed."""
    ready = tmp_path / "ready"
    processes = start_ranks(ranks, ["hold", bundle.folder, ready])
    wait_until(ready.exists, SECONDS)
    time.sleep(0.5)
    struck = time.time()
    os.kill(processes[victim].pid, blow)
    (code, output, _), *others = finish_ranks(processes, SECONDS)
    assert code == 0
    assert told.format(processes[victim].pid) in output
    assert float(output.split()[-1]) - struck < 10
    assert all(other[0] in (1, -signal.SIGKILL) for other in others)


@pytest.mark.full
def test_the_first_rank_is_missed_too(bundle: Bundle, tmp_path: Path) -> None:
    """Without it nobody is left to tell but the second, which does, and ends."""
    ready = tmp_path / "ready"
    processes = start_ranks(2, ["hold", bundle.folder, ready])
    wait_until(ready.exists, SECONDS)
    os.kill(processes[0].pid, signal.SIGKILL)
    _, (code, _, errors) = finish_ranks(processes, SECONDS)
    assert code == 1
    assert "error: The process that keeps the ranks together (torchrun, or rank 0) has died." in errors
