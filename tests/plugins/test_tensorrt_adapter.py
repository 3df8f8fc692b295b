"""Every operator becomes a TensorRT plugin whose shapes and types are the operator's."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from support.operators import CASES, Case, one_node_model
from support.tensorrt import rtx

from angelforge.engines.tensorrt_builder import EngineRequest, build_engine
from angelforge.engines.tensorrt_log import logger_of
from angelforge.engines.tensorrt_parse import parse_network
from angelforge.errors import AngelForgeError
from angelforge.plugins.operator import Attribute, Operator, Port
from angelforge.plugins.registry import OPERATORS
from angelforge.plugins.tensorrt import adapter
from angelforge.plugins.tensorrt.adapter import register
from angelforge.plugins.tensorrt.fields import empty_arrays, from_fields, to_arrays, to_fields
from angelforge.plugins.tensorrt.library import Library
from angelforge.plugins.tensorrt.types import to_tensorrt


@pytest.fixture(scope="module")
def library() -> Library:
    found = rtx()
    register(found, OPERATORS.values())
    return found


def without_functions(case: Case) -> ir.Model:
    model = one_node_model(case)
    model.functions.clear()
    return model


@pytest.mark.parametrize("case", CASES, ids=str)
def test_shapes_and_types_are_the_operators(library: Library, case: Case) -> None:
    """What TensorRT computes through the plugin is what the operator's rules say."""
    operator = OPERATORS[case.operator]
    network = parse_network(library, without_functions(case)).network
    bound = operator.bind([array.shape for array in case.inputs])
    shapes = operator.output_shapes({**bound, **case.attributes})
    types = operator.output_types([ir.DataType.from_numpy(array.dtype) for array in case.inputs], case.attributes)
    found = [network.get_output(i) for i in range(network.num_outputs)]
    assert [tuple(tensor.shape) for tensor in found] == shapes
    assert [tensor.dtype for tensor in found] == [to_tensorrt(library.api, dtype) for dtype in types]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_builds(library: Library, case: Case, tmp_path: Any) -> None:
    """An engine of the operator alone builds without a GPU, for the architecture that computes in its types."""
    request = EngineRequest(library, "sm_89", ())
    assert build_engine(without_functions(case), request, tmp_path / "log", lambda phase, share: None)


@pytest.mark.parametrize("case", [case for case in CASES if OPERATORS[case.operator].aliases], ids=str)
def test_alias_is_told(library: Library, case: Case) -> None:
    """The pool is written in place: the output is the input's memory, the others have their own."""
    operator = OPERATORS[case.operator]
    plugin: Any = adapter._creator_class(library.api).plugin_class(operator, case.attributes)
    aliased = {
        port.name: operator.inputs[index].name
        for i, port in enumerate(operator.outputs)
        if (index := plugin.get_aliased_input(i)) >= 0
    }
    assert aliased == dict(operator.aliases)


def ruled() -> Operator:
    """An operator whose shape rule uses all that rules may use."""
    return Operator(
        name="TestRule",
        doc="",
        inputs=(Port("x", "FLOAT", ("T", "H")), Port("y", "FLOAT", ("U",))),
        outputs=(Port("z", "FLOAT", ("S", "P", "Q")),),
        attributes=(Attribute("block", int),),
        derive={
            "S": lambda d: d["T"] + d["U"] * 2 + 1,
            "P": lambda d: (d["T"] + (d["block"] - 1)) // d["block"],
            "Q": lambda d: d["T"] * d["U"] // d["H"],
        },
        body=lambda op, x, y, block: x,
    )


@pytest.fixture
def rule(library: Library) -> Iterator[Operator]:
    operator = ruled()
    register(library, [operator])
    yield operator


def model_of(operator: Operator, shapes: list[list[Any]], block: int) -> ir.Model:
    inputs = [ir.val(p.name, ir.DataType.FLOAT, s) for p, s in zip(operator.inputs, shapes, strict=True)]
    node = ir.node(operator.name, inputs, {"block": block}, domain="angelforge", name="rule")
    node.outputs[0].name = "z"
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(inputs, node.outputs, nodes=[node], opset_imports={"": 24, "angelforge": 1}, name="g")
    return ir.Model(graph, ir_version=11)


def test_rules_on_known_sizes(library: Library, rule: Operator) -> None:
    network = parse_network(library, model_of(rule, [[10, 4], [6]], 8)).network
    assert tuple(network.get_output(0).shape) == (23, 2, 15)


def test_rules_on_sizes_of_run_time(library: Library, rule: Operator) -> None:
    """+, * and // of sizes that are not known yet give sizes that are not known yet, and stay exact where they are."""
    network = parse_network(library, model_of(rule, [["T", 4], [6]], 8)).network
    assert tuple(network.get_output(0).shape) == (-1, -1, -1)
    network = parse_network(library, model_of(rule, [[10, 4], ["U"]], 8)).network
    assert tuple(network.get_output(0).shape) == (-1, 2, -1)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fields_come_back(library: Library, case: Case) -> None:
    """Serialised attributes are the attributes, in the registered order whatever order the fields come in."""
    operator = OPERATORS[case.operator]
    arrays = to_arrays(operator, case.attributes)
    fields = list(to_fields(library.api, operator, arrays))
    assert [field.name for field in fields] == [attribute.name for attribute in operator.attributes]
    found = from_fields(operator, fields[::-1])
    assert list(found) == [attribute.name for attribute in operator.attributes]
    assert found == {name: pytest.approx(value, rel=1e-6) for name, value in case.attributes.items()}
    assert [type(value) for value in found.values()] == [attribute.kind for attribute in operator.attributes]
    assert [field.name for field in to_fields(library.api, operator, empty_arrays(operator))] == list(found)


def test_serialised_fields_outlive_the_call(library: Library) -> None:
    """TensorRT reads the fields after the callback has returned: their memory must not have been reused by then."""
    operator = OPERATORS["QKVPrepare"]
    attributes = {"num_heads": 4, "num_kv_heads": 2, "rotary_dim": 4, "epsilon": 1e-6}
    plugin: Any = adapter._creator_class(library.api).plugin_class(operator, attributes)
    collections = [plugin.get_fields_to_serialize() for _ in range(50)]
    rubbish = [np.full(1, 77, np.int64) for _ in range(1000)]
    for fields in collections:
        assert from_fields(operator, fields) == pytest.approx(attributes)
    assert len(rubbish) == 1000


def test_a_missing_field_is_no_zero(library: Library) -> None:
    operator = OPERATORS["MoERoute"]
    with pytest.raises(ValueError, match="MoERoute lacks the attribute top_k, n_group"):
        from_fields(operator, [library.api.PluginField("topk_group", np.array([1]), library.api.PluginFieldType.INT64)])


def test_version_is_part_of_the_name(library: Library) -> None:
    """A node that asks for a version finds the plugin of that version only."""
    operator = ruled()
    register(library, [operator])
    model = model_of(operator, [[10, 4], [6]], 8)
    node = next(iter(model.graph))
    node.attributes["plugin_version"] = ir.AttrString("plugin_version", "2")
    with pytest.raises(AngelForgeError, match=r"refuses the layer rule \(TestRule of .*Plugin not found"):
        parse_network(library, model)
    later = Operator(**{**vars(operator), "version": 2})
    register(library, [later])
    assert parse_network(library, model).network.num_outputs == 1


def test_registering_twice_is_harmless(library: Library) -> None:
    register(library, OPERATORS.values())
    register(library, OPERATORS.values())
    assert logger_of(library) is logger_of(library)


def test_failed_builds_leave_the_process_intact(library: Library, tmp_path: Any) -> None:
    """TensorRT deletes plugins of a failed build twice unless prevented: the process would end."""
    case = next(case for case in CASES if case.operator == "Fp8Linear")
    for _ in range(3):
        with pytest.raises(AngelForgeError, match="cannot compute in this precision"):
            build_engine(
                without_functions(case),
                EngineRequest(library, "sm_75", ()),
                tmp_path / "log",
                lambda phase, share: None,
            )
    assert build_engine(
        without_functions(case), EngineRequest(library, "sm_89", ()), tmp_path / "log", lambda phase, share: None
    )


def test_the_plan_holds_the_attributes(library: Library, tmp_path: Any) -> None:
    """The serialised engine carries the values themselves: seen in its bytes, behind each attribute's name."""
    case = next(case for case in CASES if case.operator == "QKVPrepare")
    plan = build_engine(
        without_functions(case), EngineRequest(library, "sm_89", ()), tmp_path / "log", lambda phase, share: None
    )
    for name in ("num_heads", "num_kv_heads", "rotary_dim"):
        begin = plan.index(name.encode())
        kind = plan.index(b"INT64", begin)
        assert kind - begin < 80
        assert int(case.attributes[name]).to_bytes(8, "little") in plan[kind : kind + 40]
