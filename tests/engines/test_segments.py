"""The graph of several ranks on a CPU: cut where the ranks sum, nothing lost, and one file again."""

from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
from support.tensorrt import graph_bundle, quiet, rtx

from angelforge.bundle import Bundle
from angelforge.engines.cpu import build_cpu, open_engine
from angelforge.engines.limits import BuildOptions
from angelforge.engines.manifest import engine_folder
from angelforge.engines.preflight import preflight
from angelforge.engines.segments import cut, join, split
from angelforge.errors import AngelForgeError, UsageError
from angelforge.exporter.rank_graph import add_rank_graph
from angelforge.precision import Precision
from angelforge.targets import get_target

SUMS = 2 + 2 * 4  # embedding and logits, attention and MLP of each layer


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return add_rank_graph(graph_bundle(tmp_path_factory.mktemp("bundle"), Precision.BF16, draft=True), 2)


def test_segments_are_the_graph(bundle: Bundle) -> None:
    """Every node once, in its order; what a segment takes was made before, and the sum comes first."""
    whole = ir.load(bundle.folder / "model.tp2.onnx")
    nodes = [node.name for node in whole.graph if node.op_type != "AllReduce"]
    segments = cut(whole)
    assert [node.name for segment in segments for node in segment.graph if node.name] == nodes
    assert len(segments) == SUMS + 1
    known = {value.name for value in whole.graph.inputs}
    for segment in segments:
        assert {value.name for value in segment.graph.inputs} <= known
        known |= {value.name for value in segment.graph.outputs}
    assert {value.name for value in whole.graph.outputs} <= known


def test_an_engine_is_one_file(bundle: Bundle) -> None:
    """In a folder of its own; built twice it is the same, and what is no archive is refused."""
    first, again = build_cpu(bundle, 2), build_cpu(bundle, 2)
    assert first.tensor_parallel == 2
    assert first.engine_digest == again.engine_digest
    folder = engine_folder(bundle, "cpu", 2)
    assert folder.name == "cpu-tp2"
    assert {path.suffix for path in folder.iterdir()} == {".zip", ".onnx", ".json"}
    graphs = [onnx.load_from_string(graph).graph for graph in split(open_engine(bundle, 2))]
    assert len(graphs) == SUMS + 1
    assert not {value.type.tensor_type.elem_type for graph in graphs for value in graph.input} & {16}  # bf16
    assert split(join([b"a", b"b"])) == [b"a", b"b"]
    with pytest.raises(AngelForgeError, match="no archive"):
        split(b"model")


def test_graphs_are_added_once_and_survive(bundle: Bundle) -> None:
    """The bundle keeps its other graphs; a graph that it lacks is asked for by name."""
    assert add_rank_graph(bundle, 2) is bundle
    assert set(bundle.manifest.graphs) == {"target", "draft", "target-tp2"}
    assert Bundle.open(bundle.folder).manifest == bundle.manifest
    with pytest.raises(UsageError, match="no graph for 4 ranks"):
        build_cpu(bundle, 4)


def test_ranks_pass_the_preflight(tmp_path: Path) -> None:
    """TensorRT takes the graph with its collectives, and its inputs for slices."""
    rtx()
    bundle = graph_bundle(
        tmp_path, Precision.FP8, head_dim=128, num_attention_heads=4, moe_intermediate_size=256, num_hidden_layers=2
    )
    found = preflight(add_rank_graph(bundle, 2), get_target("h20"), BuildOptions(tensor_parallel=2), quiet)
    assert found.weights == len(ir.load(bundle.folder / "model.onnx").graph.initializers)


@pytest.mark.full
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_the_full_shape_passes_the_preflight(tmp_path: Path, ranks: int) -> None:
    """AntAngelMed in FP8 with 128K positions on N H20."""
    rtx()
    from angelforge.exporter.synthetic_config import FULL_CONFIG

    bundle = add_rank_graph(graph_bundle(tmp_path, Precision.FP8, **FULL_CONFIG), ranks)
    found = preflight(bundle, get_target("h20"), BuildOptions(tensor_parallel=ranks), quiet)
    assert found.problem is None
    assert found.plugins == 384
