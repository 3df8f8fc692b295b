"""Quantising while packing: the bytes of the definition for any sizes, however cut, and a report that is true."""

import dataclasses
import json

import numpy as np
import pytest
from support.bundles import expected_weight, folder_tensors, rounded, same_bits
from support.fp8 import dequantised, quantise_by_definition

from angelforge.bundle import Bundle
from angelforge.checkpoint import Checkpoint
from angelforge.config_json import Section
from angelforge.dtypes import DType
from angelforge.errors import AngelForgeError
from angelforge.exporter import block_fp8, shard_writer
from angelforge.exporter.export import ExportOptions, export
from angelforge.exporter.layout import SCALE, bundle_tensors, plan_shards
from angelforge.exporter.packer import pack
from angelforge.exporter.quantization_errors import Errors
from angelforge.exporter.quantization_report import FILE, read_report
from angelforge.exporter.quantizing import kind_of
from angelforge.exporter.synthetic import small_config, write_checkpoint
from angelforge.precision import Precision

SMALL = {"num_hidden_layers": 2, "num_experts": 8}
# In "broken pages" scales stand in front of weights whose sizes are no whole pages; slices of the shared MLP begin
# inside the blocks that the whole of it would have.
SHAPES = {
    "blocks": SMALL,
    "ragged": {**SMALL, "hidden_size": 192, "moe_intermediate_size": 320, "num_shared_experts": 3},
    "broken pages": {**SMALL, "hidden_size": 200, "moe_intermediate_size": 75, "num_shared_experts": 2},
    "no shared": {**SMALL, "num_shared_experts": 0, "tie_word_embeddings": True},
}
FP8 = ExportOptions(precision=Precision.FP8)


def plan(checkpoint):
    return plan_shards(bundle_tensors(checkpoint.config, Precision.FP8, 128))


def opened(folder, shape="blocks", dtype="BF16", **options):
    return Checkpoint.open(write_checkpoint(folder, small_config(**SHAPES[shape]), dtype=dtype, **options))


def weight_files(bundle):
    return {path.name: path.read_bytes() for path in sorted((bundle / "weights").glob("*.safetensors"))}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return opened(tmp_path_factory.mktemp("source"), tokenizer=False)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stored", ["BF16", "F32", "F16"])
def test_every_tensor_is_quantised_by_the_definition_or_left_alone(tmp_path, stored, shape):
    """Each expert, and each slice of the shared MLP, by itself; the others as in a bf16 bundle."""
    checkpoint = opened(tmp_path / "c", shape, stored, tokenizer=False)
    pack(checkpoint, plan(checkpoint), tmp_path / "b")
    values, config, packed = (
        folder_tensors(checkpoint.folder),
        checkpoint.config,
        folder_tensors(tmp_path / "b/weights"),
    )
    experts = (config.num_experts, config.num_shared_experts)
    for name, found in packed.items():
        if name.endswith(SCALE) or name.startswith("rope."):
            continue
        exact = expected_weight(name, values, *experts, fp8=False)
        if name + SCALE not in packed:
            assert same_bits([found], [rounded(exact, found.dtype)]), name
            continue
        stack = exact.astype(np.float32).reshape(-1, *exact.shape[-2:])
        codes, scales = (np.stack(part) for part in zip(*map(quantise_by_definition, stack), strict=True))
        assert found.tobytes() == codes.tobytes(), name
        assert packed[name + SCALE].tobytes() == scales.tobytes(), name
    assert sum(name.endswith(SCALE) for name in packed) == 2 * (2 + 3)


def test_weights_come_before_their_scales_where_pages_allow(source):
    """So that a checkpoint is read once."""
    for shard in plan(source):
        names = [tensor.name for tensor in shard.tensors]
        assert all(names.index(name) > names.index(name.removesuffix(SCALE)) for name in names if name.endswith(SCALE))


def test_quantising_a_checkpoint_gives_the_bundle_of_its_fp8_twin(tmp_path):
    """The same random model stored in f32 and in FP8: the same weight files and the same identity."""
    folders = [opened(tmp_path / dtype, dtype=dtype).folder for dtype in ("F32", "FP8")]
    made, taken = (export(str(folder), tmp_path / f"b-{folder.name}", FP8) for folder in folders)
    files = [{**weight_files(bundle.folder)} for bundle in (made, taken)]
    layers = [{name: data for name, data in each.items() if name.startswith("layer")} for each in files]
    # Router and norms are bf16 in the FP8 checkpoint: compared are weights and scales.
    tensors = [folder_tensors(bundle.folder / "weights") for bundle in (made, taken)]
    quantised = [name for name in tensors[0] if name + SCALE in tensors[0] or name.endswith(SCALE)]
    assert len(quantised) == 20 and len(layers[0]) == 2
    assert same_bits(*([each[name] for name in quantised] for each in tensors))
    assert made.manifest.model.quantization == taken.manifest.model.quantization is not None


@pytest.mark.parametrize("shape", ["ragged", "broken pages"])
def test_borders_of_buffers_and_chunks_change_nothing(tmp_path, monkeypatch, shape):
    checkpoint = opened(tmp_path / "c", shape, tokenizer=False)
    large = pack(checkpoint, plan(checkpoint), tmp_path / "large", workers=3)
    monkeypatch.setattr(shard_writer, "BUFFER", 4096)
    small = pack(checkpoint, plan(checkpoint), tmp_path / "small", workers=1)
    assert small == large  # digests and errors
    monkeypatch.setattr(block_fp8, "_CHUNK", 128)
    chunks = pack(checkpoint, plan(checkpoint), tmp_path / "chunks")
    assert [shard.sha256 for shard in chunks] == [shard.sha256 for shard in large]


def test_a_resumed_packing_remembers_what_finished_files_lost(source, tmp_path):
    """After a kill some files are there and others not; a packing that goes on gives the same records and bytes."""
    shards = plan(source)
    records, wanted = pack(source, shards, tmp_path), weight_files(tmp_path)
    assert sum(bool(record.errors) for record in records) == 2
    for missing in (["layer-001"], ["layer-000", "head"], [name.removesuffix(".safetensors") for name in wanted], []):
        for name in missing:
            (tmp_path / f"weights/{name}.safetensors").unlink()
        assert pack(source, shards, tmp_path) == records
        assert weight_files(tmp_path) == wanted


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("name", "place", "shown"),
    [
        ("model.layers.0.attention.query_key_value.weight", (200, 7), r"\[200, 7\]"),
        ("model.layers.1.mlp.experts.5.down_proj.weight", (0, 74), r"\[0, 74\]"),
        ("model.layers.1.mlp.shared_experts.up_proj.weight", (80, 199), r"\[80, 199\]"),
        ("model.layers.1.mlp.shared_experts.down_proj.weight", (130, 76), r"\[130, 76\]"),
    ],
)
def test_what_is_not_finite_is_named(tmp_path, name, place, shown, value):
    """Tensor and position in the checkpoint; nothing unfinished is left."""
    checkpoint = opened(tmp_path / "c", "broken pages", tokenizer=False)
    info = checkpoint.tensors[name]
    with info.path.open("rb+") as file:
        file.seek(info.offset + int(np.ravel_multi_index(place, info.shape)) * 2)
        file.write(np.array(value).astype(info.dtype.numpy).tobytes())
    with pytest.raises(AngelForgeError, match=rf"{name} at {shown} is -?(nan|inf), which cannot be quantised"):
        pack(checkpoint, plan(checkpoint), tmp_path / "b")
    assert not [file for file in (tmp_path / "b/weights").iterdir() if "tmp" in file.name]


def test_only_floats_are_quantised(source, tmp_path):
    name = "model.layers.0.attention.dense.weight"
    wrong = {**source.tensors, name: dataclasses.replace(source.tensors[name], dtype=DType.I16)}
    with pytest.raises(AngelForgeError, match=rf"{name} .* is I16; only F32, F16 and BF16 can be quantised"):
        pack(Checkpoint(source.folder, source.config, wrong), plan(source), tmp_path / "b")
    assert list((tmp_path / "b/weights").iterdir()) == []


def recomputed(checkpoint):
    """Relative error by kind of tensor, and its worst tensor, from the definition."""
    sums, worst = {}, {}
    for name, weight in folder_tensors(checkpoint.folder).items():
        if weight.ndim == 2 and ("attention" in name or "mlp" in name) and not name.endswith("mlp.gate.weight"):
            exact = weight.astype(np.float64)
            lost = exact - dequantised(*quantise_by_definition(weight))
            kind, relative = kind_of(name), np.linalg.norm(lost) / np.linalg.norm(exact)
            sums[kind] = sums.get(kind, 0) + np.array([(lost**2).sum(), (exact**2).sum()])
            worst[kind] = max(worst.get(kind, (0, "")), (relative, name))
    return {kind: (np.sqrt(pair[0] / pair[1]), worst[kind]) for kind, pair in sums.items()}


def test_the_report_tells_what_was_lost(tmp_path):
    """By kind and by file; it stands in the manifest, and the same export gives the same text."""
    checkpoint = opened(tmp_path / "c", dtype="F32")
    bundle = export(str(checkpoint.folder), tmp_path / "b", FP8)
    report, wanted = read_report(bundle.folder), recomputed(checkpoint)
    assert FILE in bundle.manifest.files
    assert report["kinds"].keys() == wanted.keys() == {"attention", "dense MLP", "routed experts", "shared experts"}
    for kind, (relative, (worst, tensor)) in wanted.items():
        entry = report["kinds"][kind]
        assert 0.015 < relative < 0.04
        assert entry["relative_error"] == pytest.approx(relative, rel=1e-4)
        assert (entry["worst_tensor"], entry["clipped"]) == (tensor, 0)
        assert entry["worst_relative_error"] == pytest.approx(worst, rel=1e-4)
        assert 8 < entry["largest_error"] <= 16  # half a step of the highest octave
    assert report["all"]["weights"] == sum(entry["weights"] for entry in report["kinds"].values())
    assert list(report["files"]) == ["weights/layer-000.safetensors", "weights/layer-001.safetensors"]
    assert report["files"]["weights/layer-000.safetensors"].keys() == {"attention", "dense MLP"}
    text = (bundle.folder / FILE).read_bytes()
    (bundle.folder / FILE).unlink()
    export(str(checkpoint.folder), bundle.folder, FP8)
    assert (bundle.folder / FILE).read_bytes() == text
    Bundle.open(bundle.folder).verify()


def test_there_is_no_report_where_nothing_is_quantised(tmp_path):
    """An FP8 checkpoint passes through; another precision removes the report of an earlier export."""
    assert not (export(str(opened(tmp_path / "8", dtype="FP8").folder), tmp_path / "b8", FP8).folder / FILE).exists()
    source = str(opened(tmp_path / "16").folder)
    assert (export(source, tmp_path / "b", FP8).folder / FILE).exists()
    bundle = export(source, tmp_path / "b", ExportOptions(precision=Precision.BF16))
    assert not (bundle.folder / FILE).exists() and FILE not in bundle.manifest.files
    assert bundle.manifest.model.quantization is None


def test_the_graph_alone_belongs_to_the_quantised_weights(tmp_path):
    """Graph and weights exported apart are the bundle exported at once."""
    source = str(opened(tmp_path / "c").folder)
    first = export(source, tmp_path / "b", dataclasses.replace(FP8, graph_only=True))
    assert first.manifest.model.quantization is not None and not (first.folder / FILE).exists()
    assert export(source, tmp_path / "b", FP8).manifest == export(source, tmp_path / "whole", FP8).manifest


def test_errors_can_be_saved():
    errors = Errors(10, 2, 0, 1.25, 1e-7, 15.5, "model.a.weight", 0.1)
    assert Errors.from_saved(Section(json.loads(json.dumps(dataclasses.asdict(errors))), "test")) == errors
    assert (errors + Errors()) == errors == (Errors() + errors)
    with pytest.raises(AngelForgeError, match="zeros is missing"):
        Errors.from_saved(Section({"count": 1}, "test"))
