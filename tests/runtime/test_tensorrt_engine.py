"""The TensorRT engine around its calls: the same logits, pool and tokens as ONNX Runtime's engine.

A GPU is not needed: device memory is host memory, and what TensorRT would compute ONNX Runtime does, from the addresses
that TensorRT was given (support/tensorrt_on_cpu.py).
"""

import json
import shutil
from collections.abc import Iterator
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner, Result
from support import tensorrt_on_cpu

from angelforge.bundle import Bundle
from angelforge.engines.build import kernel_digests
from angelforge.engines.cpu import build_cpu
from angelforge.engines.manifest import MANIFESTS, EngineManifest, bundle_facts, engine_folder, graph_facts
from angelforge.engines.profiles import StepLimits, make_profiles
from angelforge.engines.tensorrt_loading import TensorrtEngine
from angelforge.errors import AngelForgeError, UsageError
from angelforge.exporter.export import ExportOptions, export
from angelforge.exporter.synthetic import small_config, write_checkpoint
from angelforge.exporter.synthetic_draft import small_draft_config, write_draft
from angelforge.plugins.tensorrt.gpu import GpuFacts
from angelforge.precision import Precision
from angelforge.runtime import device, tensorrt_loading
from angelforge.runtime.batch import Batch
from angelforge.runtime.device import open_device
from angelforge.runtime.llm import LLM
from angelforge.runtime.onnxruntime_draft import OnnxRuntimeDraft
from angelforge.runtime.onnxruntime_engine import OnnxRuntimeEngine
from angelforge.runtime.packing import Piece, pack
from angelforge.runtime.sampling import SamplingParams
from angelforge.runtime.tensorrt_draft import TensorRTDraft
from angelforge.runtime.tensorrt_engine import EngineOptions, TensorRTEngine
from angelforge.runtime.tensorrt_memory import DeviceNeeds
from angelforge.runtime.tokenizer import Tokenizer
from angelforge.tools.cli import main
from angelforge.tools.deep_runtime import runner_of, step_microseconds

PAGE, PAGES, CONTEXT, DEPTH, BATCH, ROOM = 64, 20, 256, 2, 4, 96


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("tensorrt-engine")
    config = small_config() | {"num_hidden_layers": 3}
    source = write_checkpoint(folder / "checkpoint", config, dtype="F32")
    draft = write_draft(folder / "draft", source, small_draft_config(config))
    options = ExportOptions(precision=Precision.FP32, max_context=CONTEXT, draft=str(draft))
    exported = export(str(source), folder / "bundle", options)
    build_cpu(exported)
    return Bundle.open(exported.folder)


@cache
def plan_of(path: Path) -> bytes:
    return tensorrt_on_cpu.plan_of(ir.load(path))


def opened(bundle: Bundle, role: str) -> TensorrtEngine:
    """What `open_tensorrt_engine` gives; the plan is the bundle's graph."""
    limits = StepLimits(ROOM, BATCH, CONTEXT, PAGE, PAGES, DEPTH)
    profiles = make_profiles(limits)
    plan = plan_of(bundle.folder / bundle.manifest.graphs[role])
    digest = sha256(plan).hexdigest()
    manifest = EngineManifest(
        target="h20",
        backend="tensorrt",
        backend_version="11.4.0",
        engine=f"{role}.engine",
        engine_digest=digest,
        engine_bytes=len(plan),
        architecture="sm_90",
        seconds=0.0,
        kernels=kernel_digests(bundle),
        profiles=[profile.to_dict() for profile in profiles],
        activation_bytes=[5000],
        options={"draft_depth": DEPTH, "plugins": "aot"},
        **bundle_facts(bundle),
        **graph_facts(bundle, role),
    )
    return TensorrtEngine(manifest, profiles, plan)


@pytest.fixture
def machine(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine that has an H20 and TensorRT, and engines for it in the bundle."""
    folder = engine_folder(bundle, "h20")
    folder.mkdir()
    for role, file in MANIFESTS.items():
        what = opened(bundle, role)
        (folder / what.manifest.engine).write_bytes(what.plan)
        (folder / file).write_text(what.manifest.to_json())
    library = tensorrt_on_cpu.make_library(what.profiles)
    gpu = GpuFacts("NVIDIA H20", "sm_90", 78, 102_600_000_000, "580.65.06")
    monkeypatch.setattr(tensorrt_loading, "find_gpu", lambda index: gpu)
    monkeypatch.setattr(tensorrt_loading, "load_library", lambda flavour: library)
    monkeypatch.setattr(device, "open_device", lambda name: open_device("cpu"))
    yield
    shutil.rmtree(folder)


def load(bundle: Bundle, **options: Any) -> TensorRTEngine:
    what = opened(bundle, "target")
    library = tensorrt_on_cpu.make_library(what.profiles)
    chosen = EngineOptions(**{"num_pages": PAGES, "max_batch": BATCH} | options)
    return TensorRTEngine(bundle, what, library, open_device("cpu"), chosen)


@pytest.fixture(scope="module")
def engine(bundle: Bundle) -> Iterator[TensorRTEngine]:
    made = load(bundle)
    yield made
    made.close()


@pytest.fixture
def reference(bundle: Bundle) -> OnnxRuntimeEngine:
    return OnnxRuntimeEngine(bundle, PAGES)


def steps(vocabulary: int) -> list[Batch]:
    """Two prompts, decoding of both, a verification, a chunk that wants no logits, and one sequence alone."""
    rng = np.random.default_rng(1)
    pages = [np.array([3, 7, 5], np.int32), np.array([2, 9, 4], np.int32)]

    def piece(which: int, start: int, count: int, logits: int) -> Piece:
        return Piece(rng.integers(0, vocabulary, count), start, pages[which], logits)

    return [
        pack([piece(0, 0, 20, 1), piece(1, 0, 9, 1)], PAGE),
        pack([piece(0, 20, 1, 1), piece(1, 9, 1, 1)], PAGE),
        pack([piece(0, 21, 3, 3), piece(1, 10, 2, 2)], PAGE),
        pack([piece(1, 12, 70, 0)], PAGE),
        pack([piece(1, 82, 1, 1)], PAGE),
    ]


def test_logits_and_pool_are_those_of_onnx_runtime(
    bundle: Bundle, engine: TensorRTEngine, reference: OnnxRuntimeEngine
) -> None:
    """In every kind of step, captured and padded or not."""
    for batch in steps(engine.config.vocab_size):
        found, expected = engine.forward(batch), reference.forward(batch)
        assert isinstance(found, torch.Tensor)
        assert found.shape == expected.shape
        np.testing.assert_allclose(found.numpy(), expected, rtol=2e-5, atol=2e-5)
    for pool, expected in zip(engine.pools.values(), reference.pools, strict=True):
        np.testing.assert_allclose(pool.numpy()[1:], expected[1:], rtol=2e-5, atol=2e-5)  # page 0 is nobody's


def test_captured_steps_have_sizes_of_buckets(bundle: Bundle) -> None:
    """Decoding is padded to captured sizes, prompts to others, each in a context that is never changed again."""
    engine = load(bundle, drafted=DeviceNeeds(0, 0, 0, 0))
    made = engine._runner._session._engine
    captured = list(made.contexts)
    assert made.ran == [(1, 1), (2, 2), (3, 1), (4, 4), (6, 2), (12, 4)]
    changes = [context.changes for context in captured]
    made.ran.clear()
    for batch in steps(engine.config.vocab_size):
        engine.forward(batch)
    assert made.ran == [(32, 4), (2, 2), (6, 2), (96, 4), (1, 1)]
    assert [context.changes for context in captured] == changes
    engine.close()


def test_without_graphs_nothing_is_captured(bundle: Bundle, reference: OnnxRuntimeEngine) -> None:
    """Steps have the same sizes, each with a context made at its first, and the same logits."""
    engine = load(bundle, cuda_graphs=False)
    made = engine._runner._session._engine
    assert made.contexts == []
    for batch in steps(engine.config.vocab_size):
        np.testing.assert_allclose(engine.forward(batch).numpy(), reference.forward(batch), rtol=2e-5, atol=2e-5)
    assert made.ran == [(32, 4), (2, 2), (6, 4), (96, 4), (1, 1)]
    assert len(made.contexts) == 5
    engine.forward(steps(engine.config.vocab_size)[0])
    assert len(made.contexts) == 5
    engine.close()


def test_more_rows_than_the_engine_was_built_for(engine: TensorRTEngine, reference: OnnxRuntimeEngine) -> None:
    """Scoring wants every row; the engine takes twelve at a time."""
    batch = pack([Piece(np.arange(40), 0, np.array([6], np.int32), 40)], PAGE)
    np.testing.assert_allclose(engine.forward(batch).numpy(), reference.forward(batch), rtol=2e-5, atol=2e-5)


def test_the_first_step_on_a_gpu_can_look_at_it(engine: TensorRTEngine, reference: OnnxRuntimeEngine) -> None:
    """What `doctor --deep` compares on a GPU: logits and the pool as arrays, and the time of a step."""
    batch = steps(engine.config.vocab_size)[0]
    logits, pools = runner_of(engine)(batch, {}, 2)
    np.testing.assert_allclose(logits, reference.forward(batch), rtol=2e-5, atol=2e-5)
    assert list(pools) == [f"kv_cache.{layer}" for layer in range(3)]
    assert all(np.shares_memory(pools[name], pool.numpy()) for name, pool in engine.pools.items())
    assert step_microseconds(engine, batch) > 0


def test_weights_are_bound_once_and_tied_ones_shared(bundle: Bundle, engine: TensorRTEngine) -> None:
    made = engine._runner._session._engine
    weights = {name for name in made.inputs if name in bundle.tensors}
    assert len(weights) > 20
    addresses = {tuple(context.addresses[name] for name in sorted(weights)) for context in made.contexts}
    assert len(addresses) == 1


def generate(llm: LLM, **params: Any) -> list[tuple[int, ...]]:
    prompts = [[5, 6, 7, 8] * 6, [9, 10, 11], [12] * 40, [13, 14]]
    chosen = SamplingParams(max_tokens=12, ignore_eos=True, **params)
    return [out.token_ids for out in llm.generate(prompts, chosen)]


def test_text_is_that_of_the_cpu_engine(bundle: Bundle) -> None:
    """The whole loop over it, greedy: continuous batching, chunks of prompts, sampling where the logits are."""
    tokenizer = Tokenizer.load(bundle.folder)
    with LLM.from_engine(OnnxRuntimeEngine(bundle, PAGES), tokenizer, max_batch=BATCH, max_tokens_per_step=32) as llm:
        expected = generate(llm)
    with LLM.from_engine(load(bundle), tokenizer, max_batch=BATCH, max_tokens_per_step=32) as llm:
        assert generate(llm) == expected


def test_score_gives_arrays_of_the_host(bundle: Bundle, reference: OnnxRuntimeEngine) -> None:
    with LLM.from_engine(load(bundle), max_batch=BATCH, max_tokens_per_step=64) as llm:
        found = llm.score(list(range(50)))
    with LLM.from_engine(reference, max_batch=BATCH, max_tokens_per_step=64) as llm:
        np.testing.assert_allclose(found, llm.score(list(range(50))), rtol=2e-5, atol=2e-5)


def run(bundle: Bundle, *arguments: object) -> Result:
    prompts = [option for text in ("Hello", "What is it?") for option in ("--prompt", text)]
    return CliRunner().invoke(main, ["run", str(bundle.folder), *prompts, "--json", *map(str, arguments)])


def test_run_with_a_target(bundle: Bundle, machine: None) -> None:
    """`angelforge run --target h20` from the engine's files to text, with the draft: what `--target cpu` says."""
    common = ["--max-tokens", 8, "--max-batch", BATCH, "--speculate", 2, "--ignore-eos"]
    found, expected = run(bundle, *common, "--target", "h20", "--no-cuda-graphs"), run(bundle, *common)
    assert found.exit_code == expected.exit_code == 0, found.output
    texts = [[(out["text"], out["token_ids"]) for out in json.loads(each.stdout)] for each in (found, expected)]
    assert texts[0] == texts[1]
    assert "accepted" in found.stderr


def test_seeds_mean_the_same_with_a_top_k(bundle: Bundle, machine: None) -> None:
    """Sampled text of a request with a top-k is that of the CPU engine, too."""
    common = ["--max-tokens", 8, "--max-batch", BATCH, "--speculate", 0, "--seed", 3, "--temperature", 1, "--top-k", 9]
    outputs = [json.loads(run(bundle, *common, *target).stdout) for target in ([], ["--target", "h20"])]
    assert [out["token_ids"] for out in outputs[0]] == [out["token_ids"] for out in outputs[1]]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--max-batch", 9], 2, "9 sequences are to run at once, but the engine was built for 4"),
        (["--max-batch", 2, "--speculate", 3], 2, "Speculation of 3 tokens was asked for"),
        (["--max-batch", 2, "--kv-memory-gb", 1e-6], 2, "but at least 2 are needed"),
    ],
)
def test_what_run_asks_too_much_of_an_engine(
    bundle: Bundle, machine: None, arguments: list[object], code: int, said: str
) -> None:
    result = run(bundle, "--target", "h20", *arguments)
    assert result.exit_code == code
    assert said in result.stderr


def test_a_target_without_an_engine_is_told(bundle: Bundle, machine: None) -> None:
    (engine_folder(bundle, "h20") / "manifest.json").unlink()
    result = run(bundle, "--target", "h20", "--max-batch", 2)
    assert result.exit_code == 1
    assert "There is no engine in" in result.stderr


def make_pair(bundle: Bundle) -> tuple[TensorRTEngine, TensorRTDraft]:
    target = load(bundle, drafted=DeviceNeeds(0, 0, 0, 0))
    return target, TensorRTDraft(bundle, opened(bundle, "draft"), target)


def test_drafts_propose_what_the_cpu_drafts_do(bundle: Bundle) -> None:
    """Greedy: the same tokens, and the same proposals came out."""
    first = OnnxRuntimeEngine(bundle, PAGES)
    plain = LLM.from_engine(first, max_batch=BATCH, draft=OnnxRuntimeDraft(bundle, first), speculate=2)
    target, draft = make_pair(bundle)
    with (
        plain,
        LLM.from_engine(target, max_batch=BATCH, draft=draft, speculate=2, max_tokens_per_step=64) as llm,
    ):
        assert generate(llm) == generate(plain)
        assert llm.speculation is not None
        assert plain.speculation is not None
        assert llm.speculation.acceptance_by_position == plain.speculation.acceptance_by_position


def test_the_embedding_is_not_copied(bundle: Bundle) -> None:
    target, draft = make_pair(bundle)
    made = draft._runner._session._engine
    name = "model.word_embeddings.weight"
    assert {context.addresses[name] for context in made.contexts} == {target.weights.address(name)}
    assert name not in draft._weights.layout.placements
    draft.close()
    target.close()


def test_sampled_speculation_runs(bundle: Bundle) -> None:
    target, draft = make_pair(bundle)
    with LLM.from_engine(target, max_batch=BATCH, draft=draft, speculate=2, max_tokens_per_step=64) as llm:
        found = generate(llm, temperature=0.9, top_k=20, repetition_penalty=1.1, seed=3)
    assert all(len(ids) == 12 for ids in found)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_batch": 5}, "5 sequences are to run at once, but the engine was built for 4"),
        ({"num_pages": PAGES + 1}, f"was to have {PAGES + 1} pages, but the engine takes 2 to {PAGES}"),
        ({"num_pages": None, "kv_memory": 1}, "hold 0 pages of"),
    ],
)
def test_what_the_engine_cannot_serve_is_told(bundle: Bundle, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        load(bundle, **options)


def test_a_small_device_is_told_before_weights_are_read(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    from angelforge.runtime import tensorrt_engine
    from angelforge.runtime.device import Device

    monkeypatch.setattr(tensorrt_engine, "load_weights", None)  # must not be called
    monkeypatch.setattr(Device, "free_bytes", lambda self: 900_000_000)
    with pytest.raises(AngelForgeError, match=r"needs 1\.\d+ GB of device memory \(weights .* but 0\.90 GB are free"):
        load(bundle)


def test_too_large_a_step_is_told(engine: TensorRTEngine) -> None:
    piece = Piece(np.zeros(ROOM + 1, np.int64), 0, np.arange(1, 8, dtype=np.int32), 1)
    with pytest.raises(AngelForgeError, match=f"A step has {ROOM + 1} tokens of 1 sequences"):
        engine.forward(pack([piece], PAGE))


def test_what_tensorrt_says_is_told(bundle: Bundle) -> None:
    engine = load(bundle)
    engine._runner._session._engine.fail_with = "CUDA out of memory"
    with pytest.raises(AngelForgeError, match=r"cannot run a step: CUDA out of memory\. There is not enough memory"):
        engine.forward(steps(engine.config.vocab_size)[0])
    engine.forward(steps(engine.config.vocab_size)[0])  # the engine lives on
    engine.close()


def test_a_launch_that_fails_is_told(bundle: Bundle) -> None:
    """With the words of the earlier work that it tells of."""

    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with TORCH_USE_CUDA_DSA.")

    engine = load(bundle)
    engine._runner._replays = dict.fromkeys(engine._runner._replays, lost)
    with pytest.raises(AngelForgeError, match="The GPU failed in a step: CUDA error: an illegal memory access was enc"):
        for batch in steps(engine.config.vocab_size):
            engine.forward(batch)
    engine.close()


def test_an_engine_that_cannot_be_loaded_is_told(bundle: Bundle) -> None:
    what = opened(bundle, "target")
    library = tensorrt_on_cpu.make_library(what.profiles)
    empty = TensorrtEngine(what.manifest, what.profiles, b"")
    with pytest.raises(AngelForgeError, match=r"TensorRT 11\.4\.0 cannot load the engine: the plan is empty"):
        TensorRTEngine(bundle, empty, library, open_device("cpu"), EngineOptions(num_pages=PAGES, max_batch=BATCH))


def test_a_library_that_cannot_start_is_told(bundle: Bundle) -> None:
    """With an old driver TensorRT makes no runtime, and the bindings raise a TypeError."""
    what = opened(bundle, "target")
    library = tensorrt_on_cpu.make_library(what.profiles)

    def nothing(logger: Any) -> None:
        logger.log(tensorrt_on_cpu.Severity.ERROR, "CUDA initialization failure with error: 35. Please check it.")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    library.api.Runtime = nothing
    with pytest.raises(AngelForgeError, match=r"TensorRT 11\.4\.0 cannot start here: .* install driver 580 or newer"):
        TensorRTEngine(bundle, what, library, open_device("cpu"), EngineOptions(num_pages=PAGES, max_batch=BATCH))
