"""Every operator: its shape and type rules against what its function body computes, and the body as plain ONNX."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from support.operators import CASES, Case, one_node_model

from angelforge.plugins.registry import OPERATORS


def test_every_operator_has_a_case() -> None:
    assert {case.operator for case in CASES} == set(OPERATORS)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rules_predict_what_the_body_returns(case: Case) -> None:
    model = one_node_model(case)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    results = session.run_with_ort_values(None, case.ort_values())
    for declared, result in zip(model.graph.outputs, results, strict=True):
        assert tuple(declared.shape) == tuple(result.shape())
        assert int(declared.dtype) == result.element_type()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_body_passes_the_checker_with_strict_shape_inference(case: Case) -> None:
    proto = ir.to_proto(one_node_model(case))
    onnx.checker.check_model(proto, full_check=True)
    onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_onnx_reference_evaluator_agrees_with_onnxruntime(case: Case) -> None:
    proto = ir.to_proto(one_node_model(case))
    expected = onnx.reference.ReferenceEvaluator(proto).run(None, case.arrays())
    found = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    ).run_with_ort_values(None, case.ort_values())
    for left, right in zip(expected, found, strict=True):
        if left.dtype == np.float32:
            np.testing.assert_allclose(left, right.numpy(), rtol=2e-5, atol=2e-5)
        elif left.dtype == np.int32:
            np.testing.assert_array_equal(left, right.numpy())


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_inputs_that_do_not_fit_are_refused(name: str) -> None:
    operator = OPERATORS[name]
    shapes = [[4] * (len(port.shape) + 1) for port in operator.inputs]
    with pytest.raises(ValueError, match=name):
        operator.bind(shapes)
