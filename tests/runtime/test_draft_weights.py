"""The weights of an FP8 draft on their way to TensorRT: what its network takes is what the bundle stores."""

from pathlib import Path

import onnx_ir as ir
import pytest

from angelforge.bundle import Bundle
from angelforge.dtypes import DType
from angelforge.engines.footprint import draft_bytes
from angelforge.engines.network import prepare_network
from angelforge.exporter.export import ExportOptions, export
from angelforge.exporter.synthetic import small_config, write_checkpoint
from angelforge.exporter.synthetic_draft import write_draft
from angelforge.precision import Precision
from angelforge.runtime.device import open_device
from angelforge.runtime.device_weights import load_weights
from angelforge.runtime.weight_layout import Wanted, place_weights
from angelforge.tensorfile import read_tensor


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder: Path = tmp_path_factory.mktemp("draft-weights")
    source = write_checkpoint(folder / "checkpoint", small_config(num_experts=8, num_hidden_layers=3))
    options = ExportOptions(precision=Precision.FP8, draft=str(write_draft(folder / "draft", source)))
    return export(str(source), folder / "bundle", options)


def test_every_input_is_a_tensor_of_the_bundle(bundle: Bundle) -> None:
    """Names, types and shapes fit, codes and scales arrive as they stand, and nothing that is stored is left out."""
    model = ir.load(bundle.folder / bundle.manifest.graphs["draft"])
    names, types = set(prepare_network(model)), {dtype.onnx: dtype for dtype in DType}
    wanted = {
        str(value.name): Wanted(types[int(value.dtype)], tuple(value.shape.numpy()))
        for value in model.graph.inputs
        if value.name in names and value.dtype is not None and value.shape is not None
    }
    weights = load_weights(place_weights(bundle.tensors, wanted, {}), open_device("cpu"))
    for name in wanted:
        assert weights.bytes_of(name).numpy().tobytes() == read_tensor(bundle.tensors[name]).tobytes()
    codes = [name for name, need in wanted.items() if need.dtype is DType.F8_E4M3]
    assert len(codes) == 6 and all(wanted[f"{name}_scale_inv"].dtype is DType.F32 for name in codes)
    own = {name for name in bundle.tensors if name.startswith("draft.")}
    assert own - names == {"draft.fc.weight"}  # the target's graph takes it
    assert names - own == {"model.word_embeddings.weight"}  # the target's own


def test_the_plan_counts_them(bundle: Bundle) -> None:
    manifest = bundle.manifest
    assert manifest.draft is not None
    stored = sum(info.nbytes for name, info in bundle.tensors.items() if name.startswith("draft."))
    planned = draft_bytes(manifest.draft, manifest.precision, manifest.max_context)
    assert sum(item.total for item in planned) == stored
