"""Speculation on real engines: the toy with its trained draft and with a random one, in f32 on a CPU."""

import random
from collections import deque
from pathlib import Path

import numpy as np
import pytest

from angelforge import LLM, SamplingParams
from angelforge.bundle import Bundle
from angelforge.engines.cpu import build_cpu
from angelforge.exporter.export import ExportOptions, export
from angelforge.exporter.synthetic_draft import small_draft_config, write_draft
from angelforge.runtime.batch import Float32
from angelforge.runtime.depth import Depth
from angelforge.runtime.limits import Limits
from angelforge.runtime.onnxruntime_draft import OnnxRuntimeDraft
from angelforge.runtime.onnxruntime_engine import OnnxRuntimeEngine
from angelforge.runtime.packing import Piece, pack
from angelforge.runtime.request import Request
from angelforge.runtime.speculation import Speculator
from angelforge.runtime.stepper import Stepper
from angelforge.tools.toy import DRAFT, MODEL
from angelforge.tools.toy.files import CONFIG
from angelforge.tools.toy.grammar import dialogue
from angelforge.tools.toy.tokenizer import Encoder

Prompts = list[list[int]]


def calls(count: int, seed: int) -> Prompts:
    """Dialogues of which only the last answer is missing."""
    rng, encoder, prompts = random.Random(seed), Encoder(MODEL), []
    for _ in range(count):
        ids, answer = encoder.encode(dialogue(rng))
        prompts.append(ids[: 1 + int(np.flatnonzero(~answer)[-1])].tolist())
    return prompts


def noise(count: int, seed: int) -> Prompts:
    """Random ids, of lengths around a page's end."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, CONFIG["vocab_size"], int(rng.integers(1, 70))).tolist() for _ in range(count)]


def make(folder: Path, draft: Path) -> Bundle:
    """The toy with a draft, exported and built."""
    made = export(str(MODEL), folder / "bundle", ExportOptions(draft=str(draft)))
    build_cpu(made)
    return made


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make(tmp_path_factory.mktemp("trained"), DRAFT)


@pytest.fixture(scope="module", params=["trained", "random"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, trained: Bundle) -> Bundle:
    if request.param == "trained":
        return trained
    folder = tmp_path_factory.mktemp("random")
    return make(folder, write_draft(folder / "draft", MODEL, small_draft_config(CONFIG)))


PROMPTS = [*calls(30, 1), *noise(30, 2)]
PARAMS = SamplingParams(max_tokens=12)


@pytest.fixture(scope="module")
def expected(trained: Bundle) -> list[tuple[int, ...]]:
    with LLM(trained.folder, speculate=0) as llm:
        return [output.token_ids for output in llm.generate(PROMPTS, PARAMS)]


@pytest.mark.parametrize(("depth", "max_batch", "count"), [(1, 32, 60), (3, 1, 8), (4, 8, 60), ("auto", 5, 30)])
def test_greedy_outputs_are_those_of_plain_decoding(
    bundle: Bundle, expected: list[tuple[int, ...]], depth: Depth, max_batch: int, count: int
) -> None:
    """For dialogues and noise; prompts of some share calls with the proposals of others."""
    chosen = range(0, len(PROMPTS), len(PROMPTS) // count)
    with LLM(bundle.folder, speculate=depth, max_batch=max_batch, max_tokens_per_step=max_batch * 60) as llm:
        outputs = llm.generate([PROMPTS[i] for i in chosen], PARAMS)
    assert [output.token_ids for output in outputs] == [expected[i] for i in chosen]


def test_few_pages_and_shared_prefixes_change_nothing(trained: Bundle) -> None:
    """Prompts of two pages that begin alike, in a cache that does not hold two at their longest: some are set back."""
    begins = noise(2, 11)
    prompts = [[*(begins[i % 2] * 70)[: 64 + 2 * i], i] for i in range(4)]
    params = SamplingParams(max_tokens=72, ignore_eos=True)
    with LLM(trained.folder, speculate=0, threads=1) as llm:
        wanted = [llm.generate([prompt], params)[0].token_ids for prompt in prompts]
    for depth in (0, 3):
        with LLM(trained.folder, speculate=depth, num_pages=6, max_batch=4, threads=1) as llm:
            outputs = llm.generate(prompts, params)
            assert llm.stepper.scheduler.set_back > 0
        assert [output.token_ids for output in outputs] == wanted
        assert sum(output.cached_tokens for output in outputs) > 0


@pytest.mark.full
@pytest.mark.parametrize("depth", [2, 6, "auto"])
@pytest.mark.parametrize("seed", range(5))
def test_greedy_outputs_of_many_prompts(bundle: Bundle, depth: Depth, seed: int) -> None:
    prompts, params = [*calls(100, seed), *noise(100, seed)], SamplingParams(max_tokens=40)
    with LLM(bundle.folder, speculate=0, max_batch=7) as llm:
        wanted = [output.token_ids for output in llm.generate(prompts, params)]
    with LLM(bundle.folder, speculate=depth, max_batch=16) as llm:
        assert [output.token_ids for output in llm.generate(prompts, params)] == wanted


def test_the_trained_draft_saves_calls(trained: Bundle) -> None:
    """On dialogues at depth 4: the goal of 2.5 tokens a round, and less than half of the calls."""
    with LLM(trained.folder, speculate=4) as llm:
        outputs = llm.generate(calls(8, 5), SamplingParams(max_tokens=50))
        report = llm.speculation
    assert report is not None
    assert report.accepted_length is not None
    assert report.accepted_length > 2.5
    tokens = sum(len(output.token_ids) for output in outputs)
    assert sum(output.speculation.target_calls for output in outputs if output.speculation) < 0.5 * tokens


class Watched:
    """A few requests on engines whose pools can be looked into after every step."""

    def __init__(self, bundle: Bundle, prompts: Prompts, depth: Depth) -> None:
        self.engine = OnnxRuntimeEngine(bundle, 32)
        self.draft = OnnxRuntimeDraft(bundle, self.engine)
        limits = Limits(64, 32, 512, 4, 64)
        self.stepper = Stepper(self.engine, limits, Speculator(self.draft, limits, depth))
        self.requests = [
            Request(i, np.array(ids), SamplingParams(max_tokens=20), len(ids) + 20, deque(), frozenset())
            for i, ids in enumerate(prompts)
        ]
        for request in self.requests:
            self.stepper.add(request)

    def held(self, request: Request) -> list[Float32]:
        """Keys and values of the positions that count, of each of the target's layers and of the draft's."""
        assert request.lease is not None
        places, pages = np.arange(request.computed), request.lease.pages
        return [pool[pages[places // 64], :, :, places % 64] for pool in (*self.engine.pools, self.draft.pool)]

    def close(self) -> None:
        self.draft.close()
        self.engine.close()


class Scratch:
    """Another pair of engines, for one sequence at a time."""

    def __init__(self, bundle: Bundle) -> None:
        self.engine = OnnxRuntimeEngine(bundle, 8)
        self.draft = OnnxRuntimeDraft(bundle, self.engine)

    def held(self, tokens: np.ndarray, computed: int) -> list[Float32]:
        """Keys and values after one call of each engine over the first `computed` of the known tokens."""
        pages, places = np.arange(1, 8, dtype=np.int32), np.arange(computed)
        self.engine.forward(pack([Piece(tokens[:computed], 0, pages, 0)], 64))
        self.draft.follow(pack([Piece(tokens[1 : computed + 1], 0, pages, 0)], 64), places)
        return [pool[pages[places // 64], :, :, places % 64] for pool in (*self.engine.pools, self.draft.pool)]

    def close(self) -> None:
        self.draft.close()
        self.engine.close()


def test_caches_are_those_of_plain_decoding_after_every_round(bundle: Bundle) -> None:
    """In both pools, at every position that counts; what was rejected has left no trace there."""
    watched, scratch = Watched(bundle, [*calls(2, 7), noise(1, 8)[0], [5]], 4), Scratch(bundle)
    steps = 0
    while watched.stepper.step():
        steps += 1
        assert steps < 1000  # a schedule that never comes to its end fails
        for request in watched.requests:
            if request.finished or request.lease is None or request.computed == 0:
                continue
            wanted = scratch.held(request.known, request.computed)
            for found, expected in zip(watched.held(request), wanted, strict=True):
                np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())
    scratch.close()
    watched.close()
