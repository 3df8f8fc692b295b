"""Pieces of a graph: cut where they are told to be, run by any ONNX Runtime that the project supports."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from support.operators import floats

from angelforge.runtime.validate.cutting import OrtPiece, cut


def chain() -> ir.Model:
    """x → relu → r → neg → y, with a bias that is added last."""
    x = ir.val("x", ir.DataType.FLOAT, ["T"])
    bias = ir.val("bias", ir.DataType.FLOAT, [1], const_value=ir.tensor(np.array([3], np.float32), name="bias"))
    relu = ir.Node("", "Relu", [x], num_outputs=1, name="relu")
    negative = ir.Node("", "Neg", relu.outputs, num_outputs=1, name="neg")
    add = ir.Node("", "Add", [negative.outputs[0], bias], num_outputs=1, name="add")
    for node, name in ((relu, "r"), (negative, "n"), (add, "y")):
        node.outputs[0].name, node.outputs[0].dtype = name, ir.DataType.FLOAT
        node.outputs[0].shape = ir.Shape(["T"])
    graph = ir.Graph(
        [x], add.outputs, nodes=[relu, negative, add], initializers=[bias], opset_imports={"": 24}, name="chain"
    )
    return ir.Model(graph, ir_version=11)


@pytest.mark.parametrize("version", ["1.23.2", "1.31.0"])
def test_a_piece_computes_its_part(tmp_path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """From r to y, with the weight; an older ONNX Runtime gets an older opset."""
    monkeypatch.setattr(onnxruntime, "__version__", version)
    piece = cut(chain(), ["r"], ["n", "y"])
    r = floats(5)
    found = OrtPiece(piece, tmp_path).run({"r": r, "other": r})
    np.testing.assert_array_equal(found["n"], -r)
    np.testing.assert_array_equal(found["y"], 3 - r)
    assert piece.opset_imports[""] == (23 if version < "1.24" else 24)


def test_what_needs_more_than_it_is_given_is_refused() -> None:
    with pytest.raises(ValueError, match="x"):
        cut(chain(), [], ["n"])
    with pytest.raises(ValueError, match="nowhere"):
        cut(chain(), ["nowhere"], ["y"])
