"""TensorRT's messages come back in words of the model, with a cause and the log's place."""

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from support.tensorrt import graph_bundle, quiet, rtx

from angelforge.engines import tensorrt_builder
from angelforge.engines.limits import BuildOptions
from angelforge.engines.network import prepare_network
from angelforge.engines.preparation import prepare_build
from angelforge.engines.tensorrt_builder import EngineRequest, build_engine
from angelforge.engines.tensorrt_errors import describe_nodes, explain_build_errors
from angelforge.engines.tensorrt_log import logger_of, recording
from angelforge.errors import AngelForgeError
from angelforge.plugins.registry import OPERATORS
from angelforge.plugins.tensorrt.adapter import register
from angelforge.targets import get_target

NODE = "model/layers.3/attention/QKVPrepare_node_41"
NODES = {NODE: "model.layers.3.attention (QKVPrepare of bfloat16 [T, 384])"}
LOG = Path("build.log")


@pytest.fixture
def model(tmp_path: Path) -> ir.Model:
    register(rtx(), OPERATORS.values())
    return ir.load(graph_bundle(tmp_path).folder / "model.onnx")


def build(model: ir.Model, log: Path) -> bytes:
    return build_engine(model, EngineRequest(rtx(), "sm_89", ()), log, quiet)


def add(model: ir.Model, node: ir.Node, dtype: ir.DataType = ir.DataType.INT64) -> None:
    node.outputs[0].name, node.outputs[0].dtype = "extra", dtype
    model.graph.append(node)
    model.graph.outputs.append(node.outputs[0])


def test_a_missing_plugin_names_the_layer(model: ir.Model, tmp_path: Path) -> None:
    """Place in the model, operator, shapes and types, how many more, and what to do."""
    prepare_network(model)
    for node in model.graph:
        if node.op_type == "MoECombine":
            node.attributes["plugin_version"] = ir.AttrString("plugin_version", "99")
    message = (
        r"refuses the layer model\.layers\.1\.mlp\.experts \(MoECombine of bfloat16 \[.*\], .*\) and 2 more: "
        r"Plugin not found.* export it again\."
    )
    with pytest.raises(AngelForgeError, match=message):
        build(model, tmp_path / "log")


def test_an_operator_unknown_to_tensorrt(model: ir.Model, tmp_path: Path) -> None:
    prepare_network(model)
    add(model, ir.Node("", "Unique", [model.graph.inputs[0]], num_outputs=1, name="odd"))
    with pytest.raises(AngelForgeError, match=r"refuses the layer odd \(Unique of int64 \[T\]\): unsupported node\."):
        build(model, tmp_path / "log")


def test_types_that_do_not_meet(model: ir.Model, tmp_path: Path) -> None:
    prepare_network(model)
    add(model, ir.Node("", "Add", model.graph.inputs[:2], num_outputs=1, name="odd"))
    with pytest.raises(AngelForgeError, match=r"odd \(Add of int64 \[T\], int32 \[T\]\): .*of types Int64 and"):
        build(model, tmp_path / "log")


def test_the_log_is_named_and_holds_all(model: ir.Model, tmp_path: Path) -> None:
    """Without profiles TensorRT gives the build up; the message says why, and where all of it stands."""
    prepare_network(model)
    log = tmp_path / "log"
    with pytest.raises(AngelForgeError, match=rf"gave the build up: .*no optimization profile.* is in {log}"):
        build(model, log)
    assert "no optimization profile has been defined" in log.read_text()


def test_what_tensorrt_says_after_a_build_goes_nowhere(tmp_path: Path) -> None:
    """The process has one logger for good; outside a recording it keeps quiet."""
    library = rtx()
    with recording(library, tmp_path / "log") as log:
        logger_of(library).log(library.api.ILogger.Severity.ERROR, "inside")
    logger_of(library).log(library.api.ILogger.Severity.ERROR, "outside")
    assert log.errors == ["inside"]
    assert (tmp_path / "log").read_text().endswith("ERROR inside\n")


def test_one_recording_at_a_time(tmp_path: Path) -> None:
    """TensorRT has one logger: two builds at once in one process would mix their logs."""
    library = rtx()
    with (
        recording(library, tmp_path / "log"),
        pytest.raises(AngelForgeError, match="building another engine"),
        recording(library, tmp_path / "other"),
    ):
        pass
    assert not (tmp_path / "other").exists()
    with recording(library, tmp_path / "log"):
        pass


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    with (
        pytest.raises(AngelForgeError, match=r"Cannot write .*log: there is no such file or folder"),
        recording(rtx(), tmp_path / "absent" / "log"),
    ):
        pass


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            f"IBuilder::buildSerializedNetwork: Error Code 9: Internal Error ({NODE}: could not find any supported "
            "formats consistent with input/output data types In reportPluginError at /_src/x.cpp:31)",
            r"at the layer model\.layers\.3\.attention \(QKVPrepare of bfloat16 \[T, 384\]\): model\.layers\.3"
            r"\.attention: could not find any supported formats.* No implementation takes these types and shapes",
        ),
        ("[x.cpp::resizePhysical::154] Error Code 2: OutOfMemory (Requested size 1 bytes.)", "not enough memory"),
        ("CUDA initialization failure with error: 35", "install driver 580 or newer"),
        ("Error Code 1: Myelin (Cannot compile, model contains HW-specific datatypes: b16. In f at x:1)", "precision"),
    ],
)  # fmt: skip
def test_causes(said: str, told: str) -> None:
    """Known messages bring their probable cause; noise that follows every error is left out."""
    noise = "[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (In x at y (cudaError 35: CUDA driver))"
    text = explain_build_errors("TensorRT 11", [noise, said], NODES, LOG)
    assert "checkMacros" not in text
    with pytest.raises(
        AngelForgeError, match=rf"^TensorRT 11 gave the build up.*{told}.*All it said is in build\.log\.$"
    ):
        raise AngelForgeError(text)


def test_silence_is_told(tmp_path: Path) -> None:
    assert explain_build_errors("TensorRT 11", [], {}, LOG).startswith(
        "TensorRT 11 gave the build up without saying why"
    )


def test_every_node_has_a_description(tmp_path: Path) -> None:
    """Names of the checkpoint's modules, not of files or numbers."""
    bundle = graph_bundle(tmp_path)
    model = prepare_build(bundle, get_target("rtx4090"), BuildOptions()).target.model
    described = describe_nodes(model)
    assert set(described) == {node.name for node in model.graph}
    assert described["model/layers.0/mlp/GateUp_node_9"].startswith("model.layers.0.mlp (GateUp of bfloat16 [T, 256], ")


def test_an_engine_request_for_another_architecture(model: ir.Model, tmp_path: Path, monkeypatch: Any) -> None:
    prepare_network(model)
    with pytest.raises(AngelForgeError, match=r"builds for sm_75, .*sm_121, not for sm_90"):
        build_engine(model, EngineRequest(rtx(), "sm_90", ()), tmp_path / "log", quiet)
    assert tensorrt_builder.OPERATORS is OPERATORS
