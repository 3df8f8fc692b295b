"""Packing: the right bytes for every kind of checkpoint, and refusals before anything is written."""

import json
import shutil

import numpy as np
import pytest
import safetensors
from support.bundles import expected_weight, folder_tensors, rounded, same_bits

from angelforge.atomic import lock
from angelforge.bundle import record_file
from angelforge.checkpoint import Checkpoint
from angelforge.dtypes import DType
from angelforge.errors import AngelForgeError
from angelforge.exporter import copying, pack_checks, shard_writer
from angelforge.exporter.layout import bundle_tensors, plan_shards
from angelforge.exporter.packer import pack, remove_stale
from angelforge.exporter.synthetic import small_config, write_checkpoint
from angelforge.precision import Precision
from angelforge.rope import rope_tables
from angelforge.tensorfile import read_tensor_file

SMALL = {"num_hidden_layers": 2, "num_experts": 8}
# 192 and 320 are no multiples of the FP8 block; 3 shared experts are cut by rows and columns.
SHAPES = {
    "shared": {**SMALL, "num_shared_experts": 3},
    "odd": {**SMALL, "hidden_size": 192, "moe_intermediate_size": 320},
    "tied": {**SMALL, "tie_word_embeddings": True, "num_shared_experts": 0, "first_k_dense_replace": 2},
}


def plan(checkpoint, precision):
    return plan_shards(bundle_tensors(checkpoint.config, precision, 128))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("source"), small_config(**SMALL), tokenizer=False)
    return Checkpoint.open(folder)


@pytest.fixture
def copied(source, tmp_path):
    """A checkpoint of one's own, to damage."""
    shutil.copytree(source.folder, tmp_path / "checkpoint")
    return Checkpoint.open(tmp_path / "checkpoint")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stored", ["BF16", "F32", "F16", "FP8"])
def test_every_tensor_holds_the_checkpoint_values_rounded_once(tmp_path, stored, shape):
    """All stored types, all precisions, slices of shared experts, bias in another type: equal to every bit."""
    raw = small_config(**SHAPES[shape])
    checkpoint = Checkpoint.open(
        write_checkpoint(tmp_path / "c", raw, dtype=stored, bias_dtype="BF16", tokenizer=False)
    )
    checkpoint.check()
    values, config = folder_tensors(checkpoint.folder), checkpoint.config
    for precision in Precision:
        if precision.quantized and stored != "FP8":
            continue
        bundle = tmp_path / precision.value
        pack(checkpoint, plan(checkpoint, precision), bundle)
        packed = folder_tensors(bundle / "weights")
        tables = dict(zip(("rope.cos", "rope.sin"), rope_tables(config, 128), strict=True))
        for tensor in bundle_tensors(config, precision, 128):
            name, dtype = tensor.name, tensor.dtype.numpy
            if name == "lm_head.weight" and config.tie_word_embeddings:
                assert name not in packed
            elif name in tables:
                assert same_bits([packed[name]], [tables[name]])
            else:
                experts = (config.num_experts, config.num_shared_experts)
                wanted = expected_weight(name, values, *experts, fp8=precision.quantized)
                assert same_bits([packed[name]], [rounded(wanted, dtype)]), name


def test_records_are_those_of_the_files_and_the_library_reads_them(source, tmp_path):
    """Size and digests computed while packing are what reading the files gives."""
    shards = plan(source, Precision.BF16)
    records = pack(source, shards, tmp_path)
    assert [record.file for record in records] == [shard.file for shard in shards]
    for record, shard in zip(records, shards, strict=True):
        assert record.record == record_file(tmp_path / record.file)
        assert record.header_sha256 == shard.header_sha256 and record.size == shard.size
        with safetensors.safe_open(tmp_path / record.file, "np") as file:
            assert set(file.keys()) == {tensor.name for tensor in shard.tensors}


def test_the_number_of_workers_changes_nothing(source, tmp_path):
    shards = plan(source, Precision.FP32)
    results = [pack(source, shards, tmp_path / str(count), workers=count) for count in (1, 2, 5)]
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("stored", ["BF16", "F32", "FP8"])
def test_borders_of_buffers_and_blocks_change_nothing(tmp_path, monkeypatch, stored):
    """Tensors cut anywhere by small buffers, rows converted one by one: the same bytes."""
    raw = small_config(**SHAPES["odd"] | {"num_shared_experts": 3})
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "c", raw, dtype=stored, tokenizer=False))
    shards = plan(checkpoint, Precision.BF16)
    large = pack(checkpoint, shards, tmp_path / "large")
    monkeypatch.setattr(shard_writer, "BUFFER", 4096)
    monkeypatch.setattr(copying, "_BLOCK", 300)
    assert pack(checkpoint, shards, tmp_path / "small") == large


def test_progress_rises_to_the_whole(source, tmp_path):
    shards, calls = plan(source, Precision.BF16), []
    pack(source, shards, tmp_path, lambda done, total: calls.append((done, total)))
    total = sum(shard.size for shard in shards)
    assert calls == sorted(calls) and calls[-1] == (total, total) and {t for _, t in calls} == {total}


def overwrite(checkpoint, name, value):
    """Replaces the first element of a stored tensor."""
    info = checkpoint.tensors[name]
    with info.path.open("rb+") as file:
        file.seek(info.offset)
        file.write(np.array(value).astype(info.dtype.numpy).tobytes())


@pytest.mark.parametrize(
    ("stored", "name", "value", "message"),
    [
        ("F32", "model.norm.weight", 3.4e38, r"model\.norm\.weight at \[0\] is 3\.4e\+38, which does not fit BF16"),
        ("F32", "lm_head.weight", -3.4e38, r"lm_head\.weight at \[0, 0\] is -3\.4e\+38"),
        ("FP8", "model.layers.0.attention.dense.weight_scale_inv", 1e38, r"attention\.dense\.weight at \[\d+, \d+\]"),
        (
            "FP8",
            "model.layers.1.mlp.experts.3.up_proj.weight_scale_inv",
            np.nan,
            r"experts\.3\.up_proj.*\[0, 0\] is nan",
        ),
    ],
)
def test_values_that_do_not_fit_are_named(tmp_path, stored, name, value, message):
    """Tensor and position; the finished files stay, the unfinished one leaves nothing."""
    raw = small_config(**SMALL)
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "c", raw, dtype=stored, tokenizer=False))
    overwrite(checkpoint, name, value)
    with pytest.raises(AngelForgeError, match=message):
        pack(checkpoint, plan(checkpoint, Precision.BF16), tmp_path / "b")
    assert not [file for file in (tmp_path / "b/weights").iterdir() if "tmp" in file.name]


def test_too_little_space_is_told_before_the_first_byte(source, tmp_path, monkeypatch):
    monkeypatch.setattr(pack_checks.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 10**6))
    with pytest.raises(AngelForgeError, match=r"needs 0\.0\d GB, but only 0\.00 GB are free in .*Free some space"):
        pack(source, plan(source, Precision.BF16), tmp_path)
    assert list((tmp_path / "weights").iterdir()) == []


def test_replacing_a_bundle_needs_room_for_the_files_in_flight_only(source, tmp_path, monkeypatch):
    """A bundle that fills most of the disk can be packed anew in its place."""
    shards = plan(source, Precision.BF16)
    pack(source, shards, tmp_path)
    (tmp_path / "weights/.packed.json").unlink()
    free = 2 * max(shard.size for shard in shards) + (17 << 20)
    assert free < sum(shard.size for shard in shards) + (17 << 20)
    monkeypatch.setattr(pack_checks.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, free))
    pack(source, shards, tmp_path, workers=2)


def test_fp8_is_not_made_of_other_types(source, tmp_path):
    """A layout that wants FP8 of a BF16 tensor is refused before anything is written."""
    raw = {**small_config(**SMALL)}
    fp8 = Checkpoint.open(write_checkpoint(tmp_path / "c", raw, dtype="FP8", tokenizer=False))
    mixed = Checkpoint(source.folder, fp8.config, {**fp8.tensors, **source.tensors})
    with pytest.raises(AngelForgeError, match=r"is BF16, which cannot be written as F8_E4M3"):
        pack(mixed, plan(fp8, Precision.FP8), tmp_path / "b")
    assert list((tmp_path / "b/weights").iterdir()) == []


def test_absent_and_misshapen_tensors_are_refused(source, tmp_path):
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    without = {key: info for key, info in source.tensors.items() if key != name}
    with pytest.raises(AngelForgeError, match=rf"{name} is missing"):
        pack(Checkpoint(source.folder, source.config, without), plan(source, Precision.BF16), tmp_path)
    wrong = {**source.tensors, name: source.tensors["model.norm.weight"]}
    with pytest.raises(AngelForgeError, match=rf"{name} has the shape \[256\].*\[256, 128\] is needed"):
        pack(Checkpoint(source.folder, source.config, wrong), plan(source, Precision.BF16), tmp_path)


def test_a_source_that_shrank_is_told(copied, tmp_path):
    """The header was read when the file was whole."""
    path = max(info.path for info in copied.tensors.values())
    with path.open("rb+") as file:
        file.truncate(path.stat().st_size - 1)
    with pytest.raises(AngelForgeError, match=rf"{path.name} ends at .* shortened"):
        pack(copied, plan(copied, Precision.BF16), tmp_path / "b")


def test_a_source_that_vanished_is_told(copied, tmp_path):
    path = copied.tensors["model.norm.weight"].path
    path.unlink()
    with pytest.raises(AngelForgeError, match=rf"Cannot read .*{path.name}.*no such file"):
        pack(copied, plan(copied, Precision.BF16), tmp_path / "b")


def test_a_second_packing_into_the_same_bundle_is_refused(source, tmp_path):
    (tmp_path / "weights").mkdir()
    with lock(tmp_path / "weights/.lock"), pytest.raises(AngelForgeError, match="in use by another process"):
        pack(source, plan(source, Precision.BF16), tmp_path)


def test_files_of_an_earlier_layout_can_be_removed(source, tmp_path):
    """What packing wrote and the bundle no longer needs goes; a user's own file stays."""
    shards = plan(source, Precision.BF16)
    pack(source, shards, tmp_path)
    (tmp_path / "weights/own.safetensors").touch()
    keep = [shard.file for shard in shards if "layer-001" not in shard.file]
    assert remove_stale(tmp_path, keep) == ["weights/layer-001.safetensors"]
    assert remove_stale(tmp_path, keep) == []
    left = {f"weights/{path.name}" for path in (tmp_path / "weights").glob("*.safetensors")}
    assert left == {*keep, "weights/own.safetensors"}


def test_a_journal_cannot_lead_to_files_elsewhere(source, tmp_path):
    pack(source, plan(source, Precision.BF16), tmp_path / "b")
    journal = tmp_path / "b/weights/.packed.json"
    content = json.loads(journal.read_text())
    content["files"]["../precious.safetensors"] = next(iter(content["files"].values()))
    journal.write_text(json.dumps(content))
    (tmp_path / "precious.safetensors").touch()
    remove_stale(tmp_path / "b", [])
    assert (tmp_path / "precious.safetensors").exists()


def test_headers_on_disk_are_the_planned_ones(source, tmp_path):
    """So that a graph written before anything is packed points to the right places."""
    shards = plan(source, Precision.BF16)
    pack(source, shards, tmp_path)
    for shard in shards:
        file = read_tensor_file(tmp_path / shard.file)
        assert list(file.tensors) == [tensor.name for tensor in shard.tensors]
        assert all(info.dtype in (DType.BF16, DType.F32) for info in file.tensors.values())
