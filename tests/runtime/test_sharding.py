"""A rank's slices: together they are the whole weight, they fit the graph for N ranks, and stand at block borders."""

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from angelforge.config import ModelConfig
from angelforge.dtypes import DType
from angelforge.errors import UsageError
from angelforge.exporter.export import ExportOptions, export
from angelforge.exporter.layout import bundle_tensors
from angelforge.exporter.rank_graph import add_rank_graph
from angelforge.exporter.synthetic_config import FP8_BLOCK, FULL_CONFIG, small_config
from angelforge.precision import Precision
from angelforge.ranks import rank_config
from angelforge.runtime.batch_bytes import decode, encode
from angelforge.runtime.packing import Piece, pack
from angelforge.runtime.rank_weights import read_slice
from angelforge.runtime.sharding import slices
from angelforge.runtime.weight_layout import Slice, Wanted, place_weights
from angelforge.tensorfile import TensorInfo

FULL = ModelConfig.from_dict({**FULL_CONFIG, "num_hidden_layers": 2})
FULL_FP8 = ModelConfig.from_dict({**FULL_CONFIG, "num_hidden_layers": 2, "quantization_config": FP8_BLOCK})


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("precision", [Precision.BF16, Precision.FP8], ids=lambda precision: precision.value)
def test_slices_of_all_ranks_are_the_whole(precision: Precision, ranks: int) -> None:
    """Every index of every cut axis is held as often as any other of its kind: once, or repeated key/value heads."""
    config = FULL_FP8 if precision.quantized else FULL
    shapes = {tensor.name: tensor.shape for tensor in bundle_tensors(config, precision, 4096)}
    held: dict[str, np.ndarray] = {}
    for rank in range(ranks):
        cut = slices(config, precision, rank, ranks)
        assert set(cut) <= set(shapes)
        for name, parts in cut.items():
            count = held.setdefault(name, np.zeros(shapes[name][parts[0].axis], int))
            for part in parts:
                count[part.start : part.stop] += 1
    for name, count in held.items():
        if "query_key_value" not in name:
            assert (count == 1).all()
            continue
        queries = count.shape[0] * 32 // 40
        assert (count[:queries] == 1).all()
        assert (count[queries:] == max(ranks // 4, 1)).all()


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_slices_fit_the_graph(tmp_path: Path, ranks: int) -> None:
    """AntAngelMed's sizes in FP8: weights and scales have the shapes that the graph for N ranks takes."""
    (tmp_path / "checkpoint").mkdir()
    raw = {**FULL_CONFIG, "num_hidden_layers": 2, "quantization_config": FP8_BLOCK}
    (tmp_path / "checkpoint/config.json").write_text(json.dumps(raw))
    made = export(str(tmp_path / "checkpoint"), tmp_path / "bundle", ExportOptions(graph_only=True))
    bundle = add_rank_graph(made, ranks)
    graph = ir.load(bundle.folder / f"model.tp{ranks}.onnx").graph
    wanted = {
        value.name: Wanted(next(d for d in DType if d.onnx == value.dtype), tuple(value.shape.numpy()))
        for value in graph.inputs
        if value.metadata_props and value.name and value.shape
    }
    tensors = {
        tensor.name: TensorInfo(tensor.name, tensor.dtype, tensor.shape, Path("x"), index << 40, tensor.nbytes)
        for index, tensor in enumerate(bundle_tensors(FULL_FP8, Precision.FP8, 32768))
    }
    for rank in range(ranks):
        cut = slices(FULL_FP8, Precision.FP8, rank, ranks)
        assert set(cut) == set(wanted)
        place_weights(tensors, wanted, cut)
    assert {"rank", "input_ids"} < {value.name for value in graph.inputs} - set(wanted)
    assert not set(graph.initializers) & set(wanted)


def test_a_slice_is_a_view_where_it_can_be(tmp_path: Path) -> None:
    """Rows are mapped, columns and several ranges copied; values are those of the file."""
    whole = np.arange(24, dtype=np.float32).reshape(4, 6)
    (tmp_path / "file").write_bytes(bytes(64) + whole.tobytes())
    info = TensorInfo("w", DType.F32, (4, 6), tmp_path / "file", 64, whole.nbytes)
    rows = read_slice(info, [Slice(0, 1, 3)])
    assert np.array_equal(rows, whole[1:3])
    assert not rows.flags.owndata
    assert np.array_equal(read_slice(info, [Slice(1, 2, 4)]), whole[:, 2:4])
    assert np.array_equal(read_slice(info, [Slice(0, 0, 1), Slice(0, 3, 4)]), whole[[0, 3]])


@pytest.mark.parametrize(
    ("config", "precision", "ranks", "told"),
    [
        ({}, "bf16", 3, "ranks are 1, 2, 4, 8"),
        ({"vocab_size": 1022}, "bf16", 4, "1022 ids"),
        ({"num_attention_heads": 6, "num_key_value_heads": 6}, "bf16", 4, "6 attention heads"),
        ({"num_attention_heads": 24, "num_key_value_heads": 6}, "bf16", 4, "6 key/value heads"),
        ({"intermediate_size": 384}, "fp8", 2, r"intermediate width 384 is no multiple of 256 \(128 is a block"),
        ({"moe_intermediate_size": 128}, "fp8", 2, "experts' width 128 is no multiple of 256"),
        ({"moe_intermediate_size": 256}, "fp8", 2, "128 query and 32 key rows"),
        ({"moe_intermediate_size": 96}, "bf16", 8, None),
    ],
)
def test_what_cannot_be_split_is_refused(config: dict[str, int], precision: str, ranks: int, told: str | None) -> None:
    """In a sentence that names the size."""
    whole = ModelConfig.from_dict(small_config(**config))
    if told is None:
        assert rank_config(whole, Precision(precision), ranks).moe_intermediate_size == 12
        return
    with pytest.raises(UsageError, match=told):
        rank_config(whole, Precision(precision), ranks)


def test_batches_survive_the_way_to_other_ranks() -> None:
    """Every field, whatever its size."""
    pieces = [Piece(np.arange(n), start, np.arange(1, 9, dtype=np.int32), n % 2) for n, start in ((5, 60), (1, 3))]
    batch = pack(pieces, 64)
    again = decode(encode(batch))
    for name in vars(batch):
        found, sent = getattr(again, name), getattr(batch, name)
        assert found.dtype == sent.dtype
        assert np.array_equal(found, sent)
