"""Exported drafts: the graphs compute what MODEL.md says, share the target's embedding, and only pairs are loaded."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from support.built import make_bundle, relative_error
from support.bundles import folder_tensors
from support.draft_references import load_draft_reference

from angelforge.bundle import Bundle
from angelforge.dtypes import DType
from angelforge.engines.cpu import build_cpu, engine_folder
from angelforge.errors import AngelForgeError
from angelforge.exporter.export import ExportOptions, export
from angelforge.exporter.synthetic import small_config, write_checkpoint
from angelforge.exporter.synthetic_draft import small_draft_config, write_draft
from angelforge.precision import Precision
from angelforge.runtime.batch import INPUTS
from angelforge.runtime.onnxruntime_draft import OnnxRuntimeDraft
from angelforge.runtime.onnxruntime_engine import OnnxRuntimeEngine
from angelforge.runtime.packing import Piece, pack
from angelforge.runtime.validate.draft_reference import DraftReference
from angelforge.runtime.validate.reference import load_reference

TOLERANCE = 2e-5
SMALL = small_config(num_experts=8)
PAGES = np.array([[3, 4], [6, 2]], np.int32)  # of two sequences in the draft's pool


class Pair:
    """A random target and draft, exported and loaded, and their references."""

    def __init__(self, folder: Path, changes: dict[str, Any], precision: Precision = Precision.FP32) -> None:
        dtype = "F32" if precision is Precision.FP32 else "BF16"
        self.checkpoint = write_checkpoint(folder / "checkpoint", SMALL, dtype=dtype)
        config = small_draft_config(SMALL, **changes)
        self.draft_folder = write_draft(folder / "draft", self.checkpoint, config, dtype=dtype)
        options = ExportOptions(precision=precision, draft=str(self.draft_folder))
        self.bundle = export(str(self.checkpoint), folder / "bundle", options)
        build_cpu(self.bundle)
        self.engine = OnnxRuntimeEngine(self.bundle, 8)
        self.draft = OnnxRuntimeDraft(self.bundle, self.engine)

    def reference(self) -> DraftReference:
        """A fresh one: it remembers keys."""
        return load_draft_reference(self.draft_folder, self.checkpoint)

    def hidden(self, ids: np.ndarray) -> np.ndarray:
        """What the reference target hands to the draft for `ids`."""
        return self.reference().first_hidden(load_reference(self.checkpoint).trace(ids))

    def close(self) -> None:
        self.draft.close()
        self.engine.close()


VARIANTS: dict[str, dict[str, Any]] = {
    "as published": {},
    "norms of newer drafts": {"fc_norm": True, "norm_output": True},
    "other heads, two layers, all tokens": {
        "head_dim": 48,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "draft_vocab_size": 1024,
        "rope_theta": 5e5,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [3, 0]},
    },
}


@pytest.fixture(scope="module", params=VARIANTS.values(), ids=VARIANTS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    made = Pair(tmp_path_factory.mktemp("pair"), request.param)
    yield made
    made.close()


def tokens(count: int, seed: int = 0) -> np.ndarray:
    """Random ids."""
    return np.random.default_rng(seed).integers(0, 1000, count)


def prefill(pair: Pair, ids: np.ndarray) -> None:
    """Runs the target over all of `ids` but the last, in pages of its own."""
    pair.engine.forward(pack([Piece(ids[:-1], 0, np.array([1, 2], np.int32), 0)], 64))


def test_the_target_hands_over_the_captured_states(pair: Pair) -> None:
    ids = tokens(71)
    prefill(pair, ids)
    assert relative_error(pair.engine.draft_hidden.numpy(), pair.hidden(ids[:-1])) < TOLERANCE


def test_a_step_is_the_references(pair: Pair) -> None:
    """Logits, tokens, what the next step takes, and what the cache holds, over a page's end."""
    ids = tokens(71, 1)
    prefill(pair, ids)
    found = pair.draft.follow(pack([Piece(ids[1:], 0, PAGES[0], 70)], 64), np.arange(70))
    reference = pair.reference()
    expected = reference.step(ids[1:], pair.hidden(ids[:-1]), 0)
    assert relative_error(pair.draft.logits(), expected.logits) < TOLERANCE
    np.testing.assert_array_equal(found, reference.target_ids()[expected.logits.argmax(axis=1)])
    np.testing.assert_array_equal(pair.draft.vocabulary, reference.target_ids())
    cached = np.concatenate([pair.draft.pool[page].swapaxes(1, 2) for page in PAGES[0]], axis=1)[:, :70]
    assert relative_error(cached[0], expected.keys) < TOLERANCE
    assert relative_error(cached[1], expected.values) < TOLERANCE


def test_chains_of_two_sequences_at_once(pair: Pair) -> None:
    """Each is the reference's chain, though one ends earlier and rows of the target are left out."""
    prompts = [tokens(40, 2), tokens(67, 3)]
    pieces = [Piece(ids[:-1], 0, pages, 0) for ids, pages in zip(prompts, ([1, 0], [5, 7]), strict=True)]
    pair.engine.forward(pack([Piece(p.tokens, 0, np.array(p.pages, np.int32), 0) for p in pieces], 64))
    rows = np.concatenate([np.arange(39, 39 + 66), np.arange(39)])  # the second sequence first
    order = [(prompts[1], PAGES[1]), (prompts[0], PAGES[0])]
    made = pair.draft.follow(pack([Piece(ids[1:], 0, pages, 1) for ids, pages in order], 64), rows)
    chains = [[token] for token in made.tolist()]
    for depth in range(1, 4):
        going_on = order[: 1 if depth == 3 else 2]
        made = pair.draft.extend(
            pack(
                [Piece(made[i : i + 1], len(ids) - 2 + depth, pages, 1) for i, (ids, pages) in enumerate(going_on)],
                64,
            )
        )
        for chain, token in zip(chains, made.tolist(), strict=False):
            chain.append(token)
    assert chains[0] == pair.reference().chain(prompts[1], pair.hidden(prompts[1][:-1]), 4)
    assert chains[1] == pair.reference().chain(prompts[0], pair.hidden(prompts[0][:-1]), 3)


def test_bf16_drafts_are_computed_with_their_own_weights(tmp_path: Path) -> None:
    pair = Pair(tmp_path, {}, Precision.BF16)
    ids = tokens(30)
    prefill(pair, ids)
    pair.draft.follow(pack([Piece(ids[1:], 0, PAGES[0], 29)], 64), np.arange(29))
    expected = pair.reference().step(ids[1:], pair.hidden(ids[:-1]), 0)
    assert relative_error(pair.draft.logits(), expected.logits) < TOLERANCE
    assert pair.bundle.tensors["draft.fc.weight"].dtype is DType.BF16
    pair.close()


def test_one_form_of_the_graph(pair: Pair) -> None:
    """Inputs and outputs as DESIGN.md fixes them, whatever the draft; the graph passes ONNX's checker."""
    model = onnx.load(pair.bundle.folder / "draft.onnx", load_external_data=False)
    onnx.checker.check_model(str(pair.bundle.folder / "draft.onnx"), full_check=True)
    assert [value.name for value in model.graph.input] == [*INPUTS, "hidden", "kv_cache.0"]
    assert [value.name for value in model.graph.output] == ["logits", "target_ids", "hidden_out", "kv_cache_out.0"]
    target = onnx.load(pair.bundle.folder / "model.onnx", load_external_data=False)
    assert "draft_hidden" in [value.name for value in target.graph.output]


def test_the_embedding_is_the_targets(pair: Pair) -> None:
    """Both graphs point to the same bytes, and the draft's file holds no table of that size."""
    places = []
    for name in ("model.onnx", "draft.onnx"):
        graph = onnx.load(pair.bundle.folder / name, load_external_data=False).graph
        (tensor,) = [t for t in graph.initializer if t.name == "model.word_embeddings.weight"]
        places.append([(entry.key, entry.value) for entry in tensor.external_data])
    assert places[0] == places[1]
    names = [name for name in pair.bundle.tensors if name.startswith("draft.") and "embed" in name]
    assert names == []


def test_weights_are_the_checkpoints(pair: Pair) -> None:
    found, source = folder_tensors(pair.bundle.folder / "weights"), folder_tensors(pair.draft_folder)
    np.testing.assert_array_equal(found["draft.d2t"], source["d2t"])
    np.testing.assert_array_equal(
        found["draft.midlayer.self_attn.qkv_proj.weight"],
        np.concatenate([source[f"midlayer.self_attn.{part}_proj.weight"] for part in "qkv"]),
    )
    np.testing.assert_array_equal(found["draft.fc.weight"], source["fc.weight"])


def test_the_target_is_not_changed_by_a_draft(tmp_path: Path, pair: Pair) -> None:
    """The same logits, to the last bit, as a bundle without a draft gives."""
    _, plain = make_bundle(tmp_path, {"num_experts": 8}, ExportOptions(precision=Precision.FP32))
    engine, ids = OnnxRuntimeEngine(plain, 4), tokens(50, 5)
    batch = pack([Piece(ids, 0, np.array([1], np.int32), 50)], 64)
    np.testing.assert_array_equal(engine.forward(batch), pair.engine.forward(batch))
    with pytest.raises(AngelForgeError, match="no states for a draft"):
        _ = engine.draft_hidden
    engine.close()
    with pytest.raises(AngelForgeError, match="--draft"):
        OnnxRuntimeDraft(plain, pair.engine)


@pytest.fixture
def rebuilt(tmp_path: Path, pair: Pair) -> tuple[Bundle, Bundle]:
    """A copy of the pair's bundle, and one exported again into it with another draft of other layers, not built."""
    shutil.copytree(pair.bundle.folder, tmp_path / "bundle")
    before = Bundle.open(tmp_path / "bundle")
    config = small_draft_config(SMALL, eagle_config={"eagle_aux_hidden_state_layer_ids": [2, 1]})
    draft = write_draft(tmp_path / "draft", pair.checkpoint, config, dtype="F32")
    options = ExportOptions(precision=Precision.FP32, draft=str(draft))
    return before, export(str(pair.checkpoint), tmp_path / "bundle", options)


def test_a_wrong_pairing_is_refused(tmp_path: Path, pair: Pair, rebuilt: tuple[Bundle, Bundle]) -> None:
    """An engine of the old pair is not loaded beside the new draft, nor a new draft's beside the old target's."""
    _, bundle = rebuilt
    with pytest.raises(AngelForgeError, match="Build it again"):
        OnnxRuntimeEngine(bundle, 4)
    build_cpu(bundle)
    old, new = engine_folder(pair.bundle, "cpu"), engine_folder(bundle, "cpu")
    OnnxRuntimeEngine(bundle, 4).close()
    for file in (*old.glob("draft-*.onnx"), old / "draft.json"):
        shutil.copyfile(file, new / file.name)
    with pytest.raises(AngelForgeError, match=r"was built for another (target|draft)"):
        OnnxRuntimeDraft(bundle, OnnxRuntimeEngine(bundle, 4))


def test_that_an_engine_knows_no_draft_is_told_as_that(tmp_path: Path, pair: Pair) -> None:
    """Not as operators that are there or not, which the draft brought along; the other way round too."""
    plain = ExportOptions(precision=Precision.FP32)
    drafted = ExportOptions(precision=Precision.FP32, draft=str(pair.draft_folder))
    for first, second, message in (
        (plain, drafted, r"was built without the draft \(\w{12}\) that the bundle has\. Build it again"),
        (drafted, plain, r"was built with a draft \(\w{12}\), but the bundle has none\. Build it again"),
    ):
        build_cpu(export(str(pair.checkpoint), tmp_path / "bundle", first))
        bundle = export(str(pair.checkpoint), tmp_path / "bundle", second)
        with pytest.raises(AngelForgeError, match=message):
            OnnxRuntimeEngine(bundle, 4)
        shutil.rmtree(tmp_path / "bundle")


def test_an_export_without_a_draft_removes_the_old_one(pair: Pair, rebuilt: tuple[Bundle, Bundle]) -> None:
    bundle = export(str(pair.checkpoint), rebuilt[1].folder, ExportOptions(precision=Precision.FP32))
    assert bundle.manifest.draft is None
    assert not [name for name in bundle.tensors if name.startswith("draft.")]
    assert not (bundle.folder / "draft.onnx").exists()
    assert not (bundle.folder / "weights/draft.safetensors").exists()


def test_graph_only_and_the_full_shape(tmp_path: Path) -> None:
    """The published draft's graph, from the two config.json alone."""
    import json

    from angelforge.exporter.synthetic import FULL_CONFIG
    from angelforge.exporter.synthetic_draft import FULL_DRAFT_CONFIG

    for name, config in (("model", FULL_CONFIG), ("draft", FULL_DRAFT_CONFIG)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    options = ExportOptions(graph_only=True, draft=str(tmp_path / "draft"), rope_scaling="yarn:4")
    bundle = export(str(tmp_path / "model"), tmp_path / "bundle", options)
    graph = onnx.load(bundle.folder / "draft.onnx", load_external_data=False).graph
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    assert shapes["draft.midlayer.self_attn.qkv_proj.weight"] == [6144, 8192]
    assert shapes["draft.rope.cos"] == [131072, 64]
    assert not bundle.weights_present
