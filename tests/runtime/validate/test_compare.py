"""What counts as a difference: experts are sets, ties may fall either way, parts of attention are joined."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from support.attention import Call, Shape, attend, attend_part, attention_inputs

from angelforge.runtime.batch import Batch
from angelforge.runtime.packing import Piece, pack
from angelforge.runtime.validate.compare import Scene, attended, compare_operation
from angelforge.runtime.validate.operations import JudgeGraph, Operation
from angelforge.runtime.validate.thresholds import BF16, F32, FP8_IN_F32

ROUTE = {"top_k": 2, "n_group": 1, "topk_group": 1, "num_shared_experts": 0, "routed_scaling_factor": 1.0}
ROUTER = Operation("layer 1", "MoERoute", ("logits",), ("bias",), ("ids", "weights", "bits"), ("logits", "bias"), ROUTE)


def batch(tokens: int) -> Batch:
    return pack([Piece(np.zeros(tokens, np.int64), 0, np.array([1], np.int32), 1)], 64)


def scene(tokens: int, limits=F32, **types: ir.DataType) -> Scene:
    judge = JudgeGraph(ir.Model(ir.Graph([], [], nodes=[]), ir_version=10), (), types, {}, False)
    return Scene(judge, batch(tokens), limits, 0)


def routed(logits: np.ndarray, ids: list[list[int]], weights: list[list[float]]) -> dict[str, np.ndarray]:
    return {
        "logits": logits,
        "bias": np.zeros(4, np.float32),
        "ids": np.array(ids, np.int32),
        "weights": np.array(weights, np.float32),
    }


def test_experts_are_sets() -> None:
    """Another order of the same experts, with their weights, is no difference."""
    logits = np.array([[3.0, 2.0, 0.0, -1.0]])
    expected = routed(logits, [[0, 1]], [[0.6, 0.4]])
    found = routed(logits, [[1, 0]], [[0.4, 0.6]])
    assert [(f.tensor, f.ok) for f in compare_operation(ROUTER, found, expected, scene(1))] == [
        ("ids", True),
        ("weights", True),
    ]
    found["weights"][0, 0] = 0.401
    assert [f.ok for f in compare_operation(ROUTER, found, expected, scene(1))] == [True, False]


@pytest.mark.parametrize(("third", "ok"), [(2.0 - 1e-6, True), (1.9, False)])
def test_ties_may_fall_either_way(third: float, ok: bool) -> None:
    """The second and third expert are as good as equal, or they are not."""
    logits = np.array([[3.0, 2.0, third, -1.0]])
    expected, found = routed(logits, [[0, 1]], [[0.5, 0.5]]), routed(logits, [[0, 2]], [[0.5, 0.5]])
    first = compare_operation(ROUTER, found, expected, scene(1))[0]
    assert first.ok is ok
    assert ("1 ties" in first.note) is ok
    assert [w.index for w in first.result.worst] == ([] if ok else [(0, 1)])


def test_routed_padding_is_told() -> None:
    """A row behind the last token must have no expert."""
    logits = np.array([[3.0, 2.0, 0.0, -1.0]] * 2)
    expected = routed(logits, [[0, 1], [-1, -1]], [[0.5, 0.5], [0, 0]])
    found = routed(logits, [[0, 1], [0, 1]], [[0.5, 0.5], [0.5, 0.5]])
    first = compare_operation(ROUTER, found, expected, scene(1))[0]
    assert not first.ok
    assert "1 padding rows are routed" in first.note


@pytest.mark.parametrize("largest", [1.0, 3000.0])
def test_a_massive_activation_hides_no_token(largest: float) -> None:
    """Of one token an element is 3000: that the addend of the others is dropped is less than 1e-3 of that."""
    rng = np.random.default_rng(0)
    residual, addend = rng.standard_normal((2, 12, 64)).astype(np.float32)
    residual[5, 7] = largest
    operation = Operation("layer 1", "AddNorm", ("residual", "addend"), (), ("sum",), (), {})
    judge = scene(12, BF16, sum=ir.DataType.BFLOAT16)
    judge.judge.shapes["sum"] = ir.Shape(["T", 64])
    expected = {"residual": residual, "addend": addend, "sum": residual + addend}
    stored = {"sum": expected["sum"].astype(ml_dtypes.bfloat16)}
    assert compare_operation(operation, stored, expected, judge)[0].ok
    (dropped,) = compare_operation(operation, {"sum": residual}, expected, judge)
    assert not dropped.ok
    assert ("of the largest value of token" in dropped.note) is (largest > 1)
    assert largest == 1 or 5 not in {worst.index[0] for worst in dropped.result.worst}


def test_parts_of_attention_are_joined() -> None:
    """Keys split over two parts give what undivided attention gives."""
    given = attention_inputs(Call(((5, 3),)), Shape())
    keys, values = given.keys_and_values(0)
    seen = np.arange(8)[None, :] <= given.positions[:, None]
    split = [
        attend_part(given.query, keys[:, part], values[:, part], seen[:, part], 0.2)
        for part in (slice(0, 4), slice(4, 8))
    ]
    partial, lse = (np.stack(side, axis=1).reshape(6, *side[0].shape[1:]) for side in zip(*split, strict=True))
    operation = Operation("", "PagedAttention", (), (), ("direct", "partial", "lse", "start"), (), {"split_length": 4})
    outputs = {"direct": np.zeros_like(given.query), "partial": partial, "lse": lse, "start": np.array([0], np.int32)}
    step = pack([Piece(np.zeros(3, np.int64), 5, np.array([1], np.int32), 1)], 64)
    whole = attend(given.query, keys, values, seen, 0.2)
    np.testing.assert_allclose(attended(operation, outputs, step), whole, rtol=1e-5, atol=1e-6)


def test_quantised_tensors_may_take_single_steps() -> None:
    """One e4m3 value in two hundred beside its neighbour is rounding; every tenth is not, nor is another scale."""
    operation = Operation("", "NormQuantize", (), (), ("codes", "scales"), (), {})
    codes = np.full((2, 128), 1.5, np.float32).astype(ml_dtypes.float8_e4m3fn)
    scales = np.ones((2, 1), np.float32)
    types = {"codes": ir.DataType.FLOAT8E4M3FN, "scales": ir.DataType.FLOAT}

    def verdict(changed: int, factor: float = 1.0) -> bool:
        other = codes.copy().reshape(-1)
        other[:changed] = 1.625
        found = {"codes": other.reshape(codes.shape), "scales": scales * np.float32(factor)}
        expected = {"codes": codes, "scales": scales}
        return compare_operation(operation, found, expected, scene(2, FP8_IN_F32, **types))[0].ok

    assert not verdict(1), "a step of 8 % of the largest value is more than one of e4m3 at the top"
    codes[:, -1] = 448
    assert verdict(0)
    assert verdict(1)
    assert not verdict(25)
    assert not verdict(0, 1.1)
