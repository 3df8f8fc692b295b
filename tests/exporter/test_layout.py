"""The plan of the weight files: what the graph needs, made of all that the checkpoint has, at fixed places."""

import dataclasses
import json
import time
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from angelforge.config import ModelConfig
from angelforge.errors import AngelForgeError
from angelforge.exporter.graph import build_graph
from angelforge.exporter.layout import SCALE, bundle_tensors, locate, plan_shards
from angelforge.exporter.pieces import Piece, Quantized, SameBytes
from angelforge.exporter.synthetic_config import FP8_BLOCK, FULL_CONFIG, small_config
from angelforge.inventory import expected_tensors
from angelforge.precision import Precision

VARIANTS = {
    "small": {},
    "several shared experts": {"num_shared_experts": 3},
    "no shared expert": {"num_shared_experts": 0},
    "two dense layers": {"first_k_dense_replace": 2},
    "tied": {"tie_word_embeddings": True},
    "no norm of queries and keys": {"use_qk_norm": False},
}


def quantised(model):
    """The tensors of a bundle whose FP8 is made at export."""
    return bundle_tensors(model, Precision.FP8, 256)


def config(variant="small", fp8=False):
    extra = {"quantization_config": FP8_BLOCK} if fp8 else {}
    return ModelConfig.from_dict(small_config(**VARIANTS[variant], **extra))


CASES = [(variant, precision) for variant in VARIANTS for precision in Precision]


# Without QK-norm there is no graph: export refuses such models.
@pytest.mark.parametrize(("variant", "precision"), [case for case in CASES if "use_qk_norm" not in VARIANTS[case[0]]])
def test_tensors_are_the_initializers_of_the_graph(variant, precision):
    """Name, type and shape of each; the graph's weights are found in the files and nothing else is stored."""
    model = config(variant, precision.quantized)
    tensors = bundle_tensors(model, precision, 256)
    graph = build_graph(model, precision, 16, 256).graph
    wanted = {name: (value.dtype.value, tuple(value.shape)) for name, value in graph.initializers.items()}
    assert {t.name: (t.dtype.onnx, t.shape) for t in tensors} == wanted


@pytest.mark.parametrize(("variant", "precision"), CASES)
def test_every_element_of_the_checkpoint_is_used_once(variant, precision):
    """Whole tensors or disjoint slices: sizes add up to the inventory's, tensor by tensor."""
    model = config(variant, precision.quantized)
    pieces = [p for t in bundle_tensors(model, precision, 256) if isinstance(t.source, tuple) for p in t.source]
    used = Counter()
    for piece in pieces:
        used[piece.tensor] += piece.size
    inventory = expected_tensors(model)
    assert {piece.tensor: piece.shape for piece in pieces} == {name: e.shape for name, e in inventory.items()}
    assert used == {name: Piece(name, e.shape).size for name, e in inventory.items()}
    assert len(set(pieces)) == len(pieces)


@pytest.mark.parametrize(("variant", "precision"), CASES)
def test_places_are_aligned_disjoint_and_as_the_header_says(variant, precision):
    tensors = bundle_tensors(config(variant, precision.quantized), precision, 256)
    shards = plan_shards(tensors)
    places = locate(tensors, shards)
    assert set(places) == {t.name for t in tensors}
    for tensor in tensors:
        assert places[tensor.name].offset % tensor.dtype.itemsize == 0
        assert places[tensor.name].length == tensor.nbytes
    for shard in shards:
        assert len(shard.header) % 4096 == 0
        entries = json.loads(shard.header[8:])
        for name, entry in entries.items():
            begin, end = entry["data_offsets"]
            assert (places[name].offset, places[name].length) == (len(shard.header) + begin, end - begin)
        assert shard.size == len(shard.header) + max(entry["data_offsets"][1] for entry in entries.values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_quantised_and_stored_fp8_give_the_same_bundle(variant):
    """Names, types, shapes and places; every weight is read for its codes and for its scales."""
    stored = bundle_tensors(config(variant, True), Precision.FP8, 256)
    made = quantised(config(variant))
    assert [(t.name, t.dtype, t.shape) for t in made] == [(t.name, t.dtype, t.shape) for t in stored]
    assert locate(made, plan_shards(made)) == locate(stored, plan_shards(stored))
    sources = {t.name: t.source for t in made}
    for name, source in sources.items():
        if isinstance(source, Quantized) and source.part == "codes":
            assert sources[name + SCALE] == dataclasses.replace(source, part="scales")
    inventory = expected_tensors(config(variant))
    assert {piece.tensor: piece.shape for t in made for piece in t.pieces} == {n: e.shape for n, e in inventory.items()}


def test_shared_experts_of_any_width_can_be_quantised():
    """Their slices get blocks of their own, unlike stored scales, which cannot be cut."""
    model = ModelConfig.from_dict(small_config(moe_intermediate_size=72, num_shared_experts=2))
    (down,) = [t for t in quantised(model) if t.name == "model.layers.1.mlp.experts.down_proj.weight"]
    assert [piece.columns for piece in down.pieces[-2:]] == [(0, 72), (72, 144)]


def test_one_file_a_layer():
    shards = plan_shards(bundle_tensors(config(), Precision.BF16, 256))
    layers = [f"layer-{i:03d}" for i in range(4)]
    assert [s.file for s in shards] == [f"weights/{n}.safetensors" for n in ("embeddings", *layers, "head")]
    assert {t.name for t in shards[0].tensors} == {"model.word_embeddings.weight", "rope.cos", "rope.sin"}
    assert {t.name for t in shards[-1].tensors} == {"model.norm.weight", "lm_head.weight"}


def test_a_tied_head_is_stored_once():
    tensors = bundle_tensors(config("tied"), Precision.BF16, 256)
    places = locate(tensors, plan_shards(tensors))
    assert places["lm_head.weight"] == places["model.word_embeddings.weight"]
    assert isinstance(tensors[-1].source, SameBytes)


@given(st.randoms())
def test_places_do_not_depend_on_the_order_of_equal_files(random):
    """A file's bytes are decided by its own tensors, whatever stands between them in the list."""
    tensors = bundle_tensors(config(), Precision.BF16, 256)
    by_file = [list(shard.tensors) for shard in plan_shards(tensors)]
    random.shuffle(by_file)
    shuffled = plan_shards(tensor for group in by_file for tensor in group)
    assert {s.file: s.header for s in shuffled} == {s.file: s.header for s in plan_shards(tensors)}


def test_fp8_slices_that_cut_scale_blocks_are_refused():
    """Two shared experts 64 wide share one row of scales."""
    raw = small_config(moe_intermediate_size=64, num_shared_experts=2, quantization_config=FP8_BLOCK)
    model = ModelConfig.from_dict(raw)
    with pytest.raises(AngelForgeError, match=r"2 shared experts are 64 wide.*block \(128\)"):
        bundle_tensors(model, Precision.FP8, 256)
    assert bundle_tensors(model, Precision.BF16, 256)
    assert bundle_tensors(dataclasses.replace(model, num_shared_experts=1), Precision.FP8, 256)


@pytest.mark.parametrize(("fp8", "precision", "gigabytes"), [(False, "bf16", 205.9), (True, "fp8", 104.3)])
def test_the_real_model_is_planned_in_seconds(fp8, precision, gigabytes):
    """AntAngelMed: 34 files; the published sizes, plus rope tables and the router in f32."""
    raw = {**FULL_CONFIG, **({"quantization_config": FP8_BLOCK} if fp8 else {})}
    model = ModelConfig.from_dict(raw).with_rope_scaling("yarn:4")
    start = time.process_time()
    shards = plan_shards(bundle_tensors(model, Precision(precision), 131072))
    assert time.process_time() - start < 5
    assert len(shards) == 34
    assert sum(shard.size for shard in shards) / 1e9 == pytest.approx(gigabytes, abs=0.1)
