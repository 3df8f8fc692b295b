"""Checkpoints seen through their headers: what opens, what is refused and how it is told."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import pytest
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from angelforge.checkpoint import Checkpoint
from angelforge.dtypes import DType
from angelforge.errors import AngelForgeError, UsageError
from angelforge.exporter.synthetic import small_config, write_checkpoint, write_sparse_checkpoint
from angelforge.inventory import expected_tensors
from angelforge.tensorfile import encode_header, read_tensor_file

SMALL = small_config(
    hidden_size=64, num_hidden_layers=3, num_experts=8, moe_intermediate_size=32, intermediate_size=96, vocab_size=64
)
INDEX = "model.safetensors.index.json"
Entry = tuple[DType, tuple[int, ...]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small checkpoint in three shards."""
    return write_checkpoint(tmp_path / "model", SMALL, shards=3, tokenizer=False)


@contextmanager
def edited_json(path: Path) -> Iterator[dict[str, Any]]:
    """The object in a file, written back afterwards."""
    content = json.loads(path.read_text())
    yield content
    path.write_text(json.dumps(content))


@contextmanager
def edited_header(path: Path) -> Iterator[dict[str, Entry]]:
    """Types and shapes in a safetensors file, which is written anew, with holes for values."""
    tensors: dict[str, Entry] = {
        name: (info.dtype, info.shape) for name, info in read_tensor_file(path).tensors.items()
    }
    yield tensors
    header = encode_header([(name, dtype, shape) for name, (dtype, shape) in tensors.items()], {})
    path.write_bytes(header)
    size = len(header)
    for dtype, shape in tensors.values():
        count = dtype.itemsize
        for axis in shape:
            count *= axis
        size += count
    os.truncate(path, size)


def refused(folder: Path | str, *told: str) -> str:
    """Opens and checks; returns the message, which holds everything in `told`."""
    with pytest.raises(AngelForgeError) as error:
        Checkpoint.open(folder).check()
    message = str(error.value)
    assert [text for text in told if text not in message] == []
    return message


@pytest.mark.parametrize("dtype", ["BF16", "F32", "F16", "FP8"])
@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_is_found(tmp_path: Path, dtype: Literal["BF16", "F32", "F16", "FP8"], shards: int) -> None:
    """One file or shards with an index, every type: the headers fit the configuration, and places are in the files."""
    write_checkpoint(tmp_path, SMALL, dtype=dtype, bias_dtype="BF16", shards=shards, tokenizer=False)
    checkpoint = Checkpoint.open(str(tmp_path))
    checkpoint.check()
    assert set(checkpoint.tensors) == set(expected_tensors(checkpoint.config))
    assert (checkpoint.folder, checkpoint.dropped, checkpoint.notes) == (tmp_path, [], ())
    assert checkpoint.nbytes == sum(info.nbytes for info in checkpoint.tensors.values())
    for info in checkpoint.tensors.values():
        assert info.offset + info.nbytes <= info.path.stat().st_size


def test_links_as_in_the_hub_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    """A snapshot of the Hub's cache is a folder of links that leave it."""
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        (snapshot / file.name).symlink_to(os.path.relpath(file, snapshot))
    Checkpoint.open(snapshot).check()


def test_all_misfits_in_one_message(folder: Path) -> None:
    """Missing, unexpected, misshapen and mistyped tensors: counts and the first few of each."""
    with edited_header(folder / "model-00001-of-00003.safetensors") as tensors, edited_json(folder / INDEX) as index:
        files = index["weight_map"]
        for name in ("model.word_embeddings.weight", "model.layers.0.attention.dense.weight"):
            del tensors[name], files[name]
        tensors["model.layers.0.attention.dense.bias"] = (DType.BF16, (64,))
        files["model.layers.0.attention.dense.bias"] = "model-00001-of-00003.safetensors"
        tensors["model.layers.0.input_layernorm.weight"] = (DType.BF16, (65,))
        tensors["model.layers.0.post_attention_layernorm.weight"] = (DType.I8, (64,))
    message = refused(
        folder,
        "2 missing (model.word_embeddings.weight, model.layers.0.attention.dense.weight)",
        "1 unexpected (model.layers.0.attention.dense.bias)",
        "1 of another shape (model.layers.0.input_layernorm.weight is [65], expected [64])",
        "1 of another type (model.layers.0.post_attention_layernorm.weight is I8, expected BF16 or F16 or F32)",
    )
    assert len(message) < 1000


def test_many_misfits_are_counted_not_listed(folder: Path) -> None:
    """A checkpoint of another model: the message stays short."""
    with edited_json(folder / "config.json") as config:
        config["hidden_size"] = 128
    message = refused(folder, " of another shape (", " more)")
    assert len(message) < 600


@pytest.mark.parametrize(("stored", "said"), [("FP8", "BF16"), ("BF16", "FP8")])
def test_fp8_and_its_configuration_belong_together(tmp_path: Path, stored: Any, said: Any) -> None:
    """Each half without the other is told as such."""
    write_checkpoint(tmp_path / "a", SMALL, dtype=stored, tokenizer=False)
    write_checkpoint(tmp_path / "b", SMALL, dtype=said, tokenizer=False)
    shutil.copy(tmp_path / "b" / "config.json", tmp_path / "a" / "config.json")
    refused(tmp_path / "a", "has no quantization_config" if stored == "FP8" else "no tensor is")


def test_mtp_layers_are_left_out_and_told(folder: Path) -> None:
    """Layers past the last one are not unexpected; their files need not even be there."""
    name = "model.layers.3.eh_proj.weight"
    with edited_header(folder / "model-00003-of-00003.safetensors") as tensors, edited_json(folder / INDEX) as index:
        tensors[name] = (DType.BF16, (64, 128))
        index["weight_map"] |= {name: "model-00003-of-00003.safetensors", name + "2": "mtp.safetensors"}
    with edited_json(folder / "config.json") as config:
        config["num_nextn_predict_layers"] = 1
    checkpoint = Checkpoint.open(folder)
    checkpoint.check()
    assert checkpoint.dropped == [name]
    assert "multi-token-prediction" in checkpoint.notes[0]
    assert name in checkpoint.notes[1]
    assert checkpoint.nbytes == sum(info.nbytes for info in checkpoint.tensors.values()) - 64 * 128 * 2


def test_first_layers_need_only_their_files(folder: Path) -> None:
    """With layers=1 the later shards may be absent, as long as nothing needed is in them."""
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    later = ("model.layers.1.", "model.layers.2.")
    needed = {file for name, file in weight_map.items() if not name.startswith(later)}
    removable = sorted(set(weight_map.values()) - needed)
    assert removable
    for name in removable:
        (folder / name).unlink()
    checkpoint = Checkpoint.open(folder, layers=1)
    checkpoint.check()
    assert checkpoint.config.num_hidden_layers == 1
    refused(folder, f"{len(removable)} of 3 files", removable[0])
    with pytest.raises(UsageError):
        Checkpoint.open(folder, layers=4)


def test_index_and_files_that_disagree(folder: Path) -> None:
    """A tensor in two files, one the index puts elsewhere, one the index does not know: all in one message."""
    first, second = "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"
    with edited_header(folder / first) as tensors, edited_header(folder / second) as others:
        twice = next(iter(others))
        tensors[twice] = others[twice]
        tensors["extra"] = (DType.BF16, (1,))
        del tensors["model.word_embeddings.weight"]
    refused(
        folder,
        f"1 tensors stand in two files ({twice} in {first} and {second})",
        f"1 tensors are not in the file the index says (model.word_embeddings.weight in {first})",
        f"1 tensors are not in the index (extra in {first})",
    )


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/tmp/x.safetensors", "a/../../b.safetensors", "..\\b.safetensors", "x.bin", "a\0"]
)
def test_index_paths_stay_inside(folder: Path, name: str) -> None:
    """A file name of the index is never followed out of the folder."""
    with edited_json(folder / INDEX) as index:
        index["weight_map"]["model.norm.weight"] = name
    refused(folder, repr(name), "inside its own folder")


@pytest.mark.parametrize("weight_map", [None, [], {}, "x", {"model.norm.weight": 3}, {"model.norm.weight": None}])
def test_malformed_index(folder: Path, weight_map: Any) -> None:
    """weight_map must be an object of strings."""
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    refused(folder, INDEX)


def test_absent_weights_are_explained(folder: Path) -> None:
    """What is there instead decides what is advised."""
    (folder / INDEX).unlink()
    refused(folder, "model-00001-of-00003.safetensors", "fetch the index")
    for file in folder.glob("*.safetensors"):
        file.unlink()
    refused(folder, "holds no weights")
    (folder / "pytorch_model.bin").touch()
    refused(folder, "pytorch_model.bin", "can run code", "safetensors only")


def test_both_layouts_are_ambiguous(folder: Path) -> None:
    """One file and an index: which is meant cannot be known."""
    (folder / "model.safetensors").touch()
    refused(folder, "both")


def test_truncated_shard_is_named(folder: Path) -> None:
    """An interrupted download."""
    path = folder / "model-00002-of-00003.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    refused(folder, str(path), "truncated")


@pytest.mark.parametrize("source", ["./absent", "/absent/folder", "absent", "a/b/c", "../x/y", "", "a/..", "x\0y"])
def test_absent_folders_are_told(source: str) -> None:
    """What is no Hub id is not looked for on the Hub."""
    refused(source, "There is no folder" if "\0" not in source else "")


def test_a_file_is_no_checkpoint(folder: Path) -> None:
    """The message says which folder is probably meant."""
    refused(folder / "config.json", "is a file", str(folder))


def test_a_hub_id_is_downloaded_without_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The snapshot's folder is opened; the patterns leave out Python files and other weight formats."""
    asked: dict[str, Any] = {}

    def download(repository: str, allow_patterns: list[str]) -> str:
        asked.update(repository=repository, patterns=allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    Checkpoint.open("MedAIBase/AntAngelMed").check()
    assert asked["repository"] == "MedAIBase/AntAngelMed"
    assert {"*.json", "*.safetensors"} <= set(asked["patterns"])
    assert not [pattern for pattern in asked["patterns"] if pattern.endswith((".py", ".bin")) or pattern == "*"]


@pytest.mark.parametrize(
    "error",
    [
        LocalEntryNotFoundError("no connection\nmore"),
        EntryNotFoundError("gone"),
        ConnectionError("refused"),
        OSError(28, "No space left on device"),
        ValueError("bad id"),
        RuntimeError("transfer failed"),
    ],
)
def test_a_failed_download_says_what_to_do(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline or full disk: the cause in one line, and how to bring the files here."""

    def download(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    message = refused("org/name", "org/name is no folder here", type(error).__name__, "hf download org/name")
    assert "\n" not in message


@pytest.mark.parametrize("fp8", [False, True])
def test_the_real_shape_is_small_and_exact(tmp_path: Path, fp8: bool) -> None:
    """All headers of the 103B model (24,161 or 48,129 tensors), in a process of its own: below 300 MB of memory."""
    write_sparse_checkpoint(tmp_path, fp8=fp8)
    code = (
        "import sys; from angelforge.checkpoint import Checkpoint;"
        "from angelforge.exporter.measure import peak_memory;"
        "c = Checkpoint.open(sys.argv[1]); c.check();"
        "print(len(c.tensors), c.nbytes, peak_memory() // 2**20)"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    tensors, nbytes, megabytes = map(int, result.stdout.split())
    assert (tensors, round(nbytes / 1e9, 1)) == ((48129, 104.2) if fp8 else (24161, 205.8))
    assert megabytes < 300
