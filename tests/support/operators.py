"""One small valid input set for every operator, and a model of one node around it."""

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime
from onnxscript import GraphBuilder

from angelforge.plugins.operator import DOMAIN, DOMAIN_VERSION, IR_VERSION, OPSET, call
from angelforge.plugins.registry import OPERATORS

F32 = 1  # onnx.TensorProto.FLOAT
RNG = np.random.default_rng(7)
FP8 = ml_dtypes.float8_e4m3fn


@dataclass(frozen=True, eq=False)
class Case:
    """Inputs in the operator's order and its attributes."""

    operator: str
    inputs: tuple[np.ndarray, ...]
    attributes: dict[str, int | float]

    def __str__(self) -> str:
        return self.operator

    def arrays(self) -> dict[str, np.ndarray]:
        """Inputs by name."""
        names = [port.name for port in OPERATORS[self.operator].inputs]
        return dict(zip(names, self.inputs, strict=True))

    def ort_values(self) -> dict[str, Any]:
        """Inputs as ONNX Runtime takes them, FP8 included."""
        return {name: ort_value(array) for name, array in self.arrays().items()}


def ort_value(array: np.ndarray) -> Any:
    """An OrtValue of any element type, ml_dtypes' included."""
    if array.dtype == FP8:
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(
            np.ascontiguousarray(array).view(np.uint8), int(ir.DataType.FLOAT8E4M3FN)
        )
    return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))


def one_node_model(case: Case) -> ir.Model:
    """A model whose graph is one node of the operator, with the function body."""
    operator = OPERATORS[case.operator]
    graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET, DOMAIN: DOMAIN_VERSION}, name="one_node")
    builder = GraphBuilder(graph)
    inputs = [
        builder.input(name, ir.DataType.from_numpy(array.dtype), list(array.shape))
        for name, array in case.arrays().items()
    ]
    outputs = call(builder.op, operator, *inputs, **case.attributes)
    for value, port in zip([outputs] if len(operator.outputs) == 1 else outputs, operator.outputs, strict=True):
        builder.add_output(value, f"{port.name}_result")
    return ir.Model(graph, ir_version=IR_VERSION, functions=[operator.function()])


def floats(*shape: int, scale: float = 1.0) -> np.ndarray:
    """Normal f32 values."""
    return (RNG.standard_normal(shape) * scale).astype(np.float32)


def fp8(*shape: int) -> np.ndarray:
    """Normal e4m3 values."""
    return floats(*shape).astype(FP8)


def scales(*shape: int) -> np.ndarray:
    """Positive f32 scales."""
    return RNG.uniform(0.01, 0.1, shape).astype(np.float32)


def ints(*values: Any) -> np.ndarray:
    """int32 values."""
    return np.array(values, np.int32)


T, H, HEADS, KV_HEADS, D, PAGE, PAGES = 5, 160, 4, 2, 8, 4, 6  # 160: a ragged block of 128 + 32
E, TOP_K, WIDTH = 6, 2, 136
EXPERT_IDS = ints([0, 5], [2, 0], [-1, -1], [3, 2], [4, 3])  # expert 1 has no token, token 2 is padding
EXPERT_TOKENS = ints([3, 0, 0, 0], [0] * 4, [10, 0, 0, 0], [24, 0, 0, 0], [16, 0, 0, 0], [1, 0, 0, 0])
CHOICE = (EXPERT_IDS, EXPERT_TOKENS)
STACK = floats(E, WIDTH, H, scale=0.1)
POSITIONS = ints(0, 1, 2, 5, 0)
SLOTS, ROPE = ints(4, 5, 6, 17, 0), (floats(16, 2), floats(16, 2))
STARTS, LENGTHS = ints(0, 3, 4, 4), ints(3, 6, 0)  # the third sequence is empty, the last token is padding
TABLE = ints([1, 0], [2, 4], [0, 0])
POOL = floats(PAGES, 2, KV_HEADS, PAGE, D)
ATTENTION = {"scale": 0.35, "split_length": 4, "split_queries": 2}
PARTS = (floats(T, HEADS, D), floats(18, HEADS, D), floats(18, HEADS), ints(-1, 6, -1), STARTS, LENGTHS)
EPSILON = {"epsilon": 1e-6}

CASES = [
    Case("Embedding", (np.array([0, 6, -1, 7, 3]), floats(7, H)), {"dtype": F32}),
    Case("Norm", (floats(T, H), floats(H)), EPSILON),
    Case("AddNorm", (floats(T, H), floats(T, H), floats(H)), EPSILON),
    Case("NormQuantize", (floats(T, H), floats(H)), EPSILON),
    Case("AddNormQuantize", (floats(T, H), floats(T, H), floats(H)), EPSILON),
    Case("Linear", (floats(T, H), floats(9, H)), {"dtype": F32}),
    Case("Fp8Linear", (fp8(T, H), scales(T, 2), fp8(136, H), scales(2, 2)), {"dtype": F32}),
    Case(
        "QKVPrepare",
        (floats(T, (HEADS + 2 * KV_HEADS) * D), floats(D), floats(D), *ROPE, POSITIONS, SLOTS, ints(4), POOL),
        {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "rotary_dim": 4, **EPSILON},
    ),
    Case(
        "QKVRotate",
        (floats(T, (HEADS + 2 * KV_HEADS) * D), *ROPE, POSITIONS, SLOTS, ints(4), POOL),
        {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "rotary_dim": 4},
    ),
    Case("PagedAttention", (floats(T, HEADS, D), POOL, TABLE, STARTS, LENGTHS, POSITIONS), ATTENTION),
    Case("AttentionMerge", PARTS, {"split_length": 4}),
    Case("AttentionMergeQuantize", PARTS, {"split_length": 4}),
    Case("GateUp", (floats(T, H), floats(9, H, scale=0.1), floats(9, H, scale=0.1)), {}),
    Case("Fp8GateUp", (fp8(T, H), scales(T, 2), fp8(WIDTH, H), scales(2, 2), fp8(WIDTH, H), scales(2, 2)), {}),
    Case("MoELogits", (floats(T, H), floats(E, H, scale=0.1)), {}),
    Case(
        "MoERoute",
        (floats(T, E), floats(E, scale=0.1), ints(4)),
        {"top_k": TOP_K, "n_group": 3, "topk_group": 2, "num_shared_experts": 1, "routed_scaling_factor": 2.5},
    ),
    Case("MoEGateUp", (floats(T, H), STACK, STACK[::-1], *CHOICE), {}),
    Case("MoEDown", (floats(T, TOP_K, WIDTH), floats(E, H, WIDTH, scale=0.1), *CHOICE), {}),
    Case(
        "Fp8MoEGateUp",
        (fp8(T, H), scales(T, 2), fp8(E, WIDTH, H), scales(E, 2, 2), fp8(E, WIDTH, H), scales(E, 2, 2), *CHOICE),
        {},
    ),
    Case(
        "Fp8MoEDown",
        (fp8(T, TOP_K, WIDTH), scales(T, TOP_K, 2), fp8(E, H, WIDTH), scales(E, 2, 2), *CHOICE),
        {"dtype": F32},
    ),
    Case("MoECombine", (floats(T, TOP_K, H), floats(T, TOP_K)), {"num_shared_experts": 1}),
    Case("AllReduce", (floats(T, H),), {}),
]
