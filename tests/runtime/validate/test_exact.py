"""FP8 graphs without rounding: the stored weights times their scales, one at a time."""

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from support.built import make_bundle
from support.fp8 import dequantised

from angelforge.bundle import Bundle
from angelforge.exporter.export import ExportOptions
from angelforge.plugins.operator import IR_VERSION, OPSET
from angelforge.precision import Precision
from angelforge.runtime.validate.cutting import OrtPiece
from angelforge.runtime.validate.dequantized import dequantized_graph
from angelforge.runtime.validate.exact_operators import EXACT_DOMAIN, exact_function
from angelforge.runtime.validate.operations import prepare_judge

TOKENS, HIDDEN, WIDTH, EXPERTS, TOP = 5, 192, 320, 4, 2
_FP8, _FLOAT, _INT32 = ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT, ir.DataType.INT32


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Two layers in FP8, dense and mixture of experts."""
    sizes = {"num_hidden_layers": 2, "vocab_size": 320}
    return make_bundle(tmp_path_factory.mktemp("exact"), sizes, ExportOptions(precision=Precision.FP8))[1]


def test_no_value_of_the_graph_is_a_weight(bundle: Bundle) -> None:
    """Nothing that stands between operators is as large as a weight: what is kept of a layer are its activations."""
    judge = prepare_judge(dequantized_graph(bundle))
    weights = {tuple(bundle.tensors[name].shape) for name in judge.model.graph.initializers}
    shapes = [judge.shapes[name] for operation in judge.operations for name in operation.outputs]
    assert {tuple(shape) for shape in shapes if shape is not None} & weights == set()
    assert _FP8 not in {value.dtype for node in judge.model.graph for value in node.outputs}
    stored = [value for value in judge.model.graph.initializers.values() if value.dtype == _FP8]
    assert len(stored) == 2 * 2 + 3 + 3  # attention of two layers, one MLP, one mixture of experts


def run(kind: str, *inputs: tuple[ir.DataType, np.ndarray]) -> np.ndarray:
    """What the function makes of these inputs on ONNX Runtime."""
    values = [ir.val(f"in{i}", dtype=dtype, shape=array.shape) for i, (dtype, array) in enumerate(inputs)]
    node = ir.Node(EXACT_DOMAIN, kind, values, num_outputs=1)
    node.outputs[0].name, node.outputs[0].dtype = "out", _FLOAT
    graph = ir.Graph(values, node.outputs, nodes=[node], opset_imports={"": OPSET, EXACT_DOMAIN: 1}, name="exact")
    piece = OrtPiece(ir.Model(graph, ir_version=IR_VERSION, functions=[exact_function(kind)]), Path())
    return piece.run({f"in{i}": array for i, (_, array) in enumerate(inputs)})["out"]


def weight(rng: np.random.Generator, *shape: int) -> tuple[list[tuple[ir.DataType, np.ndarray]], np.ndarray]:
    """Random e4m3 and scales of blocks, and their product in f64; sizes are no multiples of 128."""
    codes = (rng.standard_normal(shape) * 100).astype(ml_dtypes.float8_e4m3fn)
    blocks = (*shape[:-2], *(-(-size // 128) for size in shape[-2:]))
    scales = rng.uniform(0.5, 2, blocks).astype(np.float32) / 1000
    flat = zip(codes.reshape(-1, *shape[-2:]), scales.reshape(-1, *blocks[-2:]), strict=True)
    product = np.stack([dequantised(c, s).astype(np.float64) for c, s in flat]).reshape(shape)
    return [(_FP8, codes), (_FLOAT, scales)], product


def swiglu(x: np.ndarray, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    gated = x @ gate.T
    return gated / (1 + np.exp(-gated)) * (x @ up.T)


def test_what_the_functions_compute() -> None:
    """Each is the definition with the product of codes and scales; experts only those that are named."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((TOKENS, HIDDEN)).astype(np.float32)
    linear, wide = weight(rng, WIDTH, HIDDEN)
    np.testing.assert_allclose(run("Fp8Linear", (_FLOAT, x), *linear), x @ wide.T, rtol=1e-4, atol=1e-4)
    other, wide_other = weight(rng, WIDTH, HIDDEN)
    found = run("Fp8GateUp", (_FLOAT, x), *linear, *other)
    np.testing.assert_allclose(found, swiglu(x, wide, wide_other), rtol=1e-4, atol=1e-4)
    ids = np.array([[0, 3], [3, 1], [-1, -1], [1, 0], [3, 0]], np.int32)
    chosen = [(_INT32, ids), (_INT32, np.zeros((EXPERTS, 1), np.int32))]
    (gate, wide_gate), (up, wide_up) = weight(rng, EXPERTS, WIDTH, HIDDEN), weight(rng, EXPERTS, WIDTH, HIDDEN)
    inner = run("Fp8MoEGateUp", (_FLOAT, x), *gate, *up, *chosen)
    down, wide_down = weight(rng, EXPERTS, HIDDEN, WIDTH)
    out = run("Fp8MoEDown", (_FLOAT, inner), *down, *chosen)
    for token, row in enumerate(ids):
        for entry, expert in enumerate(row):
            here = inner[token, entry]
            expected = 0 * here if expert < 0 else swiglu(x[token : token + 1], wide_gate[expert], wide_up[expert])[0]
            np.testing.assert_allclose(here, expected, rtol=1e-4, atol=1e-4)
            after = 0 * out[token, entry] if expert < 0 else here @ wide_down[expert].T
            np.testing.assert_allclose(out[token, entry], after, rtol=1e-4, atol=1e-4)
