"""`LLM` on a real engine: what a request gets does not depend on how it was cut, packed, paged and accompanied."""

from pathlib import Path

import numpy as np
import pytest

from angelforge import LLM, SamplingParams
from angelforge.engines.cpu import build_cpu
from angelforge.exporter.export import ExportOptions, export

PROMPTS = [np.random.default_rng(n).integers(0, 1024, n).tolist() for n in (1, 3, 64, 65, 150)]
PARAMS = [
    SamplingParams(max_tokens=24, ignore_eos=True),
    SamplingParams(max_tokens=7, repetition_penalty=1.3, ignore_eos=True),
    SamplingParams(max_tokens=16, temperature=0.7, top_k=20, top_p=0.9, seed=1, ignore_eos=True),
    SamplingParams(max_tokens=1),
    SamplingParams(max_tokens=12, temperature=1.0, min_p=0.02, seed=2, ignore_eos=True),
]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, small_checkpoint: Path) -> Path:
    """A small built bundle."""
    opened = export(str(small_checkpoint), tmp_path_factory.mktemp("llm") / "bundle", ExportOptions())
    build_cpu(opened)
    return opened.folder


@pytest.fixture(scope="module")
def alone(bundle: Path) -> list[tuple[int, ...]]:
    """What every request gets when nothing else runs and its prompt is computed at once."""
    with LLM(bundle) as llm:
        return [llm.generate([ids], params)[0].token_ids for ids, params in zip(PROMPTS, PARAMS, strict=True)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_batch": 2, "max_tokens_per_step": 2},
        {"max_batch": 3, "max_tokens_per_step": 37},
        {"num_pages": 4},  # one or two requests at a time
        {"threads": 1},
    ],
)
def test_outputs_are_those_of_the_requests_alone(bundle: Path, alone: list[tuple[int, ...]], options) -> None:
    with LLM(bundle, **options) as llm:
        assert [output.token_ids for output in llm.generate(PROMPTS, PARAMS)] == alone


def test_scores_agree_with_what_is_generated(bundle: Path) -> None:
    with LLM(bundle, max_tokens_per_step=50) as llm:
        (output,) = llm.generate([PROMPTS[3]], SamplingParams(max_tokens=10, ignore_eos=True))
        whole = [*output.prompt_token_ids, *output.token_ids]
        following = llm.score(whole).argmax(axis=1)[len(PROMPTS[3]) - 1 : -1]
    assert tuple(following.tolist()) == output.token_ids


def test_the_cache_is_as_large_as_asked(bundle: Path) -> None:
    """A page of this model: 64 tokens × 4 layers × keys and values × 2 heads × 32 dimensions × 4 bytes."""
    page = 64 * 4 * 2 * 2 * 32 * 4
    with LLM(bundle, kv_memory=5 * page) as llm:
        (output,) = llm.generate([[1] * 250], SamplingParams(max_tokens=8))
        assert output.error is not None
        assert "KV cache holds 256 tokens" in output.error
    with LLM(bundle, max_batch=1) as llm:
        assert llm._engine.num_pages == 512 // 64 + 1
