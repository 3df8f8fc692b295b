"""The graph as TensorRT takes it: weights are inputs, nothing is read, misfits are refused by name."""

import ctypes
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import pytest
from support.tensorrt import graph_bundle, rtx

from angelforge.bundle import Bundle
from angelforge.engines import kernel_checks
from angelforge.engines.limits import BuildOptions
from angelforge.engines.network import prepare_network
from angelforge.engines.preparation import prepare_build
from angelforge.engines.shapes import check_volumes, concrete_shapes
from angelforge.engines.tensorrt_parse import parse_network
from angelforge.errors import AngelForgeError
from angelforge.plugins.kernel import Gpu
from angelforge.plugins.operator import Operator
from angelforge.plugins.registry import OPERATORS
from angelforge.plugins.tensorrt import gpu
from angelforge.plugins.tensorrt.adapter import register
from angelforge.plugins.tensorrt.launches import Launch
from angelforge.precision import Precision
from angelforge.targets import get_target

COMPILED = Launch(SimpleNamespace(ptx="// by LLVM\n.version 9.1\n.target sm_90a\n"), (1, 1, 1), ())  # type: ignore[arg-type]
SIZES = {"T": 7, "B": 3, "B+1": 4, "P": 8, "R": 2, "pages": 20}


@pytest.fixture(scope="module", params=list(Precision), ids=lambda precision: precision.value)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return graph_bundle(tmp_path_factory.mktemp("bundle"), request.param)


def load(bundle: Bundle) -> ir.Model:
    return ir.load(bundle.folder / "model.onnx")


def test_every_weight_becomes_an_input(bundle: Bundle) -> None:
    """Names, types and shapes are those of the weight files, and none is left behind as an initializer."""
    expected = {name: (value.dtype, list(value.shape or ())) for name, value in load(bundle).graph.initializers.items()}
    model = load(bundle)
    weights = prepare_network(model)
    found = {value.name: (value.dtype, list(value.shape or ())) for value in model.graph.inputs}
    assert set(weights) == set(expected)
    assert {name: found[name] for name in weights} == expected
    assert not model.graph.initializers
    assert not model.functions


def test_the_parser_takes_it(bundle: Bundle) -> None:
    """TensorRT sees the same inputs and outputs under the same names, and a plugin for every operator."""
    library = rtx()
    register(library, OPERATORS.values())
    model = load(bundle)
    prepare_network(model)
    network = parse_network(library, model).network
    inputs = {network.get_input(i).name for i in range(network.num_inputs)}
    outputs = {network.get_output(i).name for i in range(network.num_outputs)}
    assert inputs == {value.name for value in model.graph.inputs}
    assert outputs == {value.name for value in model.graph.outputs} >= {"logits", "kv_cache_out.0"}
    kinds = [network.get_layer(i).type for i in range(network.num_layers)]
    operators = sum(node.domain == "angelforge" for node in model.graph)
    assert kinds.count(library.api.LayerType.PLUGIN_V3) == operators > 30


def test_the_bundle_stays_as_it_is(bundle: Bundle) -> None:
    before = (bundle.folder / "model.onnx").read_bytes()
    prepare_network(load(bundle))
    assert (bundle.folder / "model.onnx").read_bytes() == before


def test_one_rank_sums_nothing(bundle: Bundle) -> None:
    model = load(bundle)
    assert any(node.op_type == "AllReduce" for node in model.graph)
    prepare_network(model)
    assert not any(node.op_type in ("AllReduce", "DistCollective") for node in model.graph)


def test_two_ranks_sum_in_tensorrt(bundle: Bundle) -> None:
    """Every AllReduce becomes TensorRT's own collective, in its place, and parses."""
    library = rtx()
    register(library, OPERATORS.values())
    reduced = [node.name for node in load(bundle).graph if node.op_type == "AllReduce"]
    model = load(bundle)
    prepare_network(model, ranks=2)
    assert [node.name for node in model.graph if node.op_type == "DistCollective"] == reduced
    network = parse_network(library, model).network
    kinds = [network.get_layer(i).type for i in range(network.num_layers)]
    assert kinds.count(library.api.LayerType.DIST_COLLECTIVE) == len(reduced)


def test_concrete_shapes_follow_the_rules(bundle: Bundle) -> None:
    """Every tensor has a shape once the step's sizes are known; a few by hand."""
    model = load(bundle)
    prepare_network(model)
    shapes = {value.name: shape for value, shape in concrete_shapes(model, SIZES).items()}
    assert set(shapes) == {value.name for node in model.graph for value in node.outputs} | {
        value.name for value in model.graph.inputs
    }
    assert shapes["logits"] == (2, bundle.manifest.model.vocab_size)
    assert shapes["kv_cache_out.1"] == shapes["kv_cache.1"] == (20, 2, 2, 64, 32)
    assert shapes["query_start"] == (4,)


def test_large_tensors_are_refused_by_name(bundle: Bundle) -> None:
    """2³¹ elements are too many, one page less is not."""
    model = load(bundle)
    prepare_network(model)
    page = 2 * 2 * 64 * 32
    check_volumes(model, SIZES | {"pages": 2**31 // page - 1})
    with pytest.raises(AngelForgeError, match=r"kv_cache.0 would have 2147483648 elements .* Lower --pages"):
        check_volumes(model, SIZES | {"pages": 2**31 // page})


def test_a_large_weight_is_refused_by_name(tmp_path: Path) -> None:
    """A model as wide as Ling-1T has expert stacks beyond the limit."""
    bundle = graph_bundle(
        tmp_path, hidden_size=8192, moe_intermediate_size=2048, num_experts=256, n_group=8, topk_group=4
    )
    model = load(bundle)
    prepare_network(model)
    with pytest.raises(AngelForgeError, match=r"mlp.experts.gate_proj.weight would have \d+ elements .* too wide"):
        check_volumes(model, SIZES)


def drop_attribute(node: ir.Node) -> None:
    node.attributes.pop("top_k")


def rename(node: ir.Node) -> None:
    node.op_type = "MoEGuess"


def retype(node: ir.Node) -> None:
    bias = node.inputs[1]
    assert bias is not None
    bias.dtype = ir.DataType.INT32


def reshape(node: ir.Node) -> None:
    bias = node.inputs[1]
    assert bias is not None
    bias.shape = ir.Shape([3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_attribute, r"MoERoute_node_\d+ \(MoERoute\) has the attributes .* needed .*top_k"),
        (rename, r"\(MoEGuess\) is of an operator that this version does not know"),
        (retype, r"does not fit its operator: MoERoute: input bias is INT32"),
        (reshape, r"does not fit its operator: MoERoute: input bias has shape \[3\]"),
    ],
)
def test_misfits_are_named(bundle: Bundle, change: Callable[[ir.Node], None], message: str) -> None:
    """A graph that contradicts the operators never reaches TensorRT: an exception in a plugin could end the process."""
    model = load(bundle)
    change(next(node for node in model.graph if node.op_type == "MoERoute"))
    with pytest.raises(AngelForgeError, match=message):
        prepare_network(model)


def test_other_operators_version_is_named(bundle: Bundle) -> None:
    model = load(bundle)
    model.graph.opset_imports["angelforge"] = 9
    with pytest.raises(AngelForgeError, match=r"operators are of version 9, this needs version 1"):
        prepare_network(model)


def test_sizes_that_no_kernel_serves_are_refused_by_name(tmp_path: Path) -> None:
    """Before TensorRT starts: layer, operator, and what its kernel cannot do."""
    pytest.importorskip("triton")
    bundle = graph_bundle(tmp_path, Precision.FP32)
    message = r"serves the layer model/layers.0/\S+ \(Linear\) in profile decode-8: .*f32 bundles run on the CPU target"
    with pytest.raises(AngelForgeError, match=message):
        prepare_build(bundle, get_target("h20"), BuildOptions())


def test_kernels_are_compiled_before_tensorrt_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every different call of every profile once, with the most tokens of the profile that the operator sees."""
    pytest.importorskip("triton")
    asked: list[tuple[str, int]] = []

    def plan(operator: Operator, *rest: Any) -> Launch:
        asked.append((operator.name, rest[3]))
        return COMPILED

    monkeypatch.setattr(kernel_checks, "plan_launch", plan)
    prepared = prepare_build(graph_bundle(tmp_path), get_target("h20"), BuildOptions(max_tokens=512, max_batch=4))
    shares: list[float] = []
    kernel_checks.compile_kernels(
        prepared.target.model, prepared.profiles, Gpu("sm_90", 78), lambda phase, share: shares.append(share)
    )
    assert {tokens for name, tokens in asked if name == "GateUp"} == {8, 64, 256, 512}
    assert {tokens for name, tokens in asked if name == "Norm"} == {8, 64, 256, 512}
    assert sum(name == "MoEDown" for name, _ in asked) == 4  # all layers are alike
    assert (shares[0], shares[-1]) == (0.0, 1.0)
    assert shares == sorted(shares)


@pytest.mark.parametrize(("newest", "refused"), [((9, 0), True), ((9, 1), False), ((10, 0), False), (None, False)])
def test_ptx_that_the_driver_cannot_compile_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, newest: tuple[int, int] | None, refused: bool
) -> None:
    """Engines hold PTX; with an assembler that is newer than the driver they would build and not load."""
    pytest.importorskip("triton")
    monkeypatch.setattr(kernel_checks, "plan_launch", lambda *arguments: COMPILED)
    monkeypatch.setattr(kernel_checks, "newest_ptx", lambda: newest)
    prepared = prepare_build(graph_bundle(tmp_path), get_target("h20"), BuildOptions(max_tokens=8, max_batch=2))
    arguments = (prepared.target.model, prepared.profiles, Gpu("sm_90", 78), lambda phase, share: None)
    if not refused:
        kernel_checks.compile_kernels(*arguments)
        return
    with pytest.raises(AngelForgeError, match=r"kernels are PTX 9\.1, but the NVIDIA driver compiles up to PTX 9\.0"):
        kernel_checks.compile_kernels(*arguments)


@pytest.mark.parametrize(
    ("cuda", "ptx"), [(12050, (8, 5)), (12060, (8, 5)), (12090, (8, 8)), (13000, (9, 0)), (13030, (9, 3))]
)
def test_a_driver_compiles_the_ptx_of_its_cuda(
    monkeypatch: pytest.MonkeyPatch, cuda: int, ptx: tuple[int, int]
) -> None:
    """As NVIDIA lists them, and as Triton has them for its assembler."""

    class Driver:
        def cuDriverGetVersion(self, version: Any) -> int:  # noqa: N802 - CUDA's name
            version._obj.value = cuda
            return 0

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    assert gpu.newest_ptx() == ptx
    compiler = pytest.importorskip("triton.backends.nvidia.compiler")
    assert compiler.ptx_get_version(f"{cuda // 1000}.{cuda % 1000 // 10}") == 10 * ptx[0] + ptx[1]
