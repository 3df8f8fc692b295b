"""Routing and the weighted sum of experts: kernels in the interpreter against the function bodies."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.bodies import run_body, run_reference
from support.interpreter import run_interpreted, to_numpy, to_torch
from support.routing import expert_tokens

from angelforge.plugins.kernel import Kernel
from angelforge.plugins.moe_combine.kernel import KERNEL as COMBINE
from angelforge.plugins.moe_logits.kernel import KERNEL as LOGITS
from angelforge.plugins.moe_route.kernel import KERNEL as ROUTE

BF16 = ml_dtypes.bfloat16
PROFILES = (8, 64, 256, 8192)
EXAMPLES = settings(max_examples=max(10, settings().max_examples // 5))
SEED = st.integers(0, 2**32 - 1)
SUM_ERROR = 5e-7  # of the sum of magnitudes: IEEE f32 stays far below, TF32 far above


def run(kernel: Kernel, inputs: list[np.ndarray], attributes: dict[str, int | float], **options) -> list[np.ndarray]:
    """The kernel's outputs as arrays."""
    return [to_numpy(y) for y in run_interpreted(kernel, [to_torch(x) for x in inputs], attributes, **options)]


def logit_inputs(tokens: int, experts: int, depth: int, seed: int, dtype: type = BF16) -> list[np.ndarray]:
    """Random hidden states and router weights."""
    rng = np.random.default_rng(seed)
    return [
        rng.standard_normal((tokens, depth)).astype(dtype),
        (rng.standard_normal((experts, depth)) * depth**-0.5).astype(np.float32),
    ]


def logit_error(found: np.ndarray, hidden: np.ndarray, weight: np.ndarray) -> float:
    """Largest error against f64, as a share of the sum of magnitudes."""
    hidden, weight = hidden.astype(np.float64), weight.astype(np.float64)
    return float((np.abs(found - hidden @ weight.T) / (np.abs(hidden) @ np.abs(weight).T)).max())


@EXAMPLES
@given(
    tokens=st.integers(1, 40),
    experts=st.integers(1, 40),
    depth=st.integers(1, 700) | st.sampled_from([512, 4096]),
    dtype=st.sampled_from([BF16, np.float32]),
    profile=st.sampled_from(PROFILES),
    seed=SEED,
)
def test_logits_are_ieee_f32(tokens: int, experts: int, depth: int, dtype: type, profile: int, seed: int) -> None:
    """As near to the exact sums as f32 allows, in every profile's tile."""
    inputs = logit_inputs(tokens, experts, depth, seed, dtype)
    found = run(LOGITS, inputs, {}, profile_tokens=profile)[0]
    assert logit_error(found, *inputs) < SUM_ERROR
    assert logit_error(run_body(LOGITS.operator, inputs, {})[0], *inputs) < 4 * SUM_ERROR


def test_tf32_would_be_seen() -> None:
    """The bound above is one that products rounded to TF32 (10 bits) miss by far."""
    hidden, weight = logit_inputs(4, 16, 4096, 0)
    rounded = ((weight.view(np.uint32) + 0x1000) & 0xFFFFE000).view(np.float32)
    assert logit_error(hidden.astype(np.float64) @ rounded.T, hidden, weight) > 10 * SUM_ERROR


@pytest.mark.parametrize("depth", [328, 4096])
def test_logits_do_not_depend_on_the_batch(depth: int) -> None:
    """Bit for bit: a token alone and among others, in every profile's tile."""
    hidden, weight = logit_inputs(35, 20, depth, 1)
    alone = run(LOGITS, [hidden[34:], weight], {}, profile_tokens=8, ordered=True)[0]
    for profile in PROFILES:
        batch = run(LOGITS, [hidden, weight], {}, profile_tokens=profile, ordered=True)[0]
        np.testing.assert_array_equal(alone[0], batch[34])


def attributes_of(top_k: int, n_group: int, topk_group: int, shared: int) -> dict[str, int | float]:
    """MoERoute's attributes."""
    return {
        "top_k": top_k,
        "n_group": n_group,
        "topk_group": topk_group,
        "num_shared_experts": shared,
        "routed_scaling_factor": 2.5,
    }


@st.composite
def routings(draw: st.DrawFn) -> tuple[int, dict[str, int | float]]:
    """(experts, attributes) of a router that can choose top_k experts within its groups."""
    groups, size = draw(st.sampled_from([1, 2, 3, 4, 8])), draw(st.sampled_from([1, 2, 3, 4, 8, 32, 40]))
    kept = draw(st.integers(1, groups))
    top_k = draw(st.integers(1, min(kept * size, 9)))
    return groups * size, attributes_of(top_k, groups, kept, draw(st.integers(0, 3)))


def nearly_tied(logits: np.ndarray, bias: np.ndarray, attributes: dict[str, int | float]) -> np.ndarray:
    """bool [T]: rows in which some biased scores or sums of groups are so close that rounding may order them."""
    scores = 1 / (1 + np.exp(-logits.astype(np.float64))) + bias
    grouped = np.sort(scores.reshape(len(scores), int(attributes["n_group"]), -1), axis=2)
    sums = np.sort(grouped[:, :, -2:].sum(2), axis=1)
    close = [np.diff(np.sort(scores, axis=1)) < 1e-6, np.diff(sums) < 1e-6]
    return np.concatenate(close, axis=1).any(1)


def exact_weights(logits: np.ndarray, ids: np.ndarray, attributes: dict[str, int | float]) -> np.ndarray:
    """The weights of the experts `ids` in f64."""
    top_k = int(attributes["top_k"])
    picked = 1 / (1 + np.exp(-np.take_along_axis(logits.astype(np.float64), np.maximum(ids[:, :top_k], 0), axis=1)))
    share = picked / (picked.sum(1, keepdims=True) if top_k > 1 else 1)
    weights = np.concatenate([share * attributes["routed_scaling_factor"], np.ones_like(ids[:, top_k:])], axis=1)
    return np.where(ids < 0, 0, weights)


@EXAMPLES
@given(routing=routings(), tokens=st.integers(1, 12), padding=st.integers(0, 3), seed=SEED)
@example(routing=(12, attributes_of(3, 3, 2, 1)), tokens=140, padding=2, seed=0)
def test_route_equals_its_body(
    routing: tuple[int, dict[str, int | float]], tokens: int, padding: int, seed: int
) -> None:
    """The same experts in the same order, the same weights, and the same choice as bits."""
    experts, attributes = routing
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((tokens, experts)) * 2).astype(np.float32)
    bias = (rng.standard_normal(experts) * 0.3).astype(np.float32)  # some biased scores are negative
    inputs = [logits, bias, np.array([tokens - padding], np.int32)]
    ids, weights, bits = run(ROUTE, inputs, attributes)
    body = run_body(ROUTE.operator, inputs, attributes)
    clear = ~nearly_tied(logits, bias, attributes)
    np.testing.assert_array_equal(ids[clear], body[0][clear])
    # ONNX Runtime's own sigmoid is off by 1e-7.
    np.testing.assert_allclose(weights[clear], body[1][clear], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(weights, exact_weights(logits, ids, attributes), rtol=3e-6)
    np.testing.assert_array_equal(bits, expert_tokens(ids, experts + int(attributes["num_shared_experts"])))
    if clear.all():
        np.testing.assert_array_equal(bits, body[2])


@EXAMPLES
@given(routing=routings(), seed=SEED)
def test_ties_go_to_the_lower_index(routing: tuple[int, dict[str, int | float]], seed: int) -> None:
    """With a few values only, among experts and among groups alike."""
    experts, attributes = routing
    logits = np.random.default_rng(seed).choice(np.array([0, 0.5, 1, 1.5], np.float32), (6, experts))
    inputs = [logits, np.zeros(experts, np.float32), np.array([6], np.int32)]
    np.testing.assert_array_equal(run(ROUTE, inputs, attributes)[0], run_body(ROUTE.operator, inputs, attributes)[0])


def test_both_of_two_equal_best_count() -> None:
    """Groups [1.5, 1.5, 0, 0] and [1.5, 1, 0, 0], in either order: the one with the larger sum is kept."""
    equal, other = [1.5, 1.5, 0, 0], [1.5, 1, 0, 0]
    logits = np.array([equal + other, other + equal], np.float32)
    inputs = [logits, np.zeros(8, np.float32), np.array([2], np.int32)]
    ids = run(ROUTE, inputs, attributes_of(2, 2, 1, 0))[0]
    np.testing.assert_array_equal(ids, [[0, 1], [4, 5]])
    np.testing.assert_array_equal(ids, run_body(ROUTE.operator, inputs, attributes_of(2, 2, 1, 0))[0])


def test_the_models_own_router() -> None:
    """256 experts in 8 groups, 8 of 4 groups chosen; groups that are closed lose even to negative scores."""
    attributes = attributes_of(8, 8, 4, 1)
    rng = np.random.default_rng(3)
    logits = rng.standard_normal((9, 256)).astype(np.float32)
    bias = np.full(256, -3, np.float32)
    ids, weights, bits = run(ROUTE, [logits, bias, np.array([9], np.int32)], attributes)
    body = run_body(ROUTE.operator, [logits, bias, np.array([9], np.int32)], attributes)
    np.testing.assert_array_equal(ids, body[0])
    np.testing.assert_array_equal(bits, body[2])
    np.testing.assert_allclose(weights[:, :8].sum(1), 2.5, rtol=1e-6)
    assert (ids[:, 8] == 256).all() and (weights[:, 8] == 1).all()
    assert all(len(set(row[:8] // 32)) <= 4 for row in ids)


@pytest.mark.parametrize("num_tokens", [-(2**31), -1, 0, 3, 5, 2**31 - 1])
def test_any_number_of_tokens_is_safe(num_tokens: int) -> None:
    """Rows from num_tokens on are padding: expert −1, weight 0, no bit."""
    logits = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)
    inputs = [logits, np.zeros(8, np.float32), np.array([num_tokens], np.int32)]
    ids, weights, bits = run(ROUTE, inputs, attributes_of(2, 2, 1, 1))
    real = min(max(num_tokens, 0), 5)
    assert (ids[real:] == -1).all() and (weights[real:] == 0).all()
    assert (ids[:real] >= 0).all() and (weights[:real] > 0).all()
    np.testing.assert_array_equal(bits, expert_tokens(ids, 9))


@pytest.mark.parametrize("value", [-1e30, -200.0, 200.0, 1e30, np.inf, -np.inf, np.nan])
def test_extreme_logits_are_safe(value: float) -> None:
    """Experts exist and are distinct for any logits, NaN included; without NaN all weights are finite."""
    logits = np.full((3, 8), value, np.float32)
    inputs = [logits, np.zeros(8, np.float32), np.array([3], np.int32)]
    ids, weights, bits = run(ROUTE, inputs, attributes_of(3, 2, 2, 0))
    assert all(len(set(row)) == 3 and 0 <= row.min() <= row.max() < 8 for row in ids)
    assert np.isnan(value) or np.isfinite(weights).all()
    np.testing.assert_array_equal(bits, expert_tokens(ids, 8))


@EXAMPLES
@given(
    tokens=st.integers(1, 5),
    routed=st.integers(1, 9),
    shared=st.integers(0, 2),
    channels=st.integers(1, 1500),
    dtype=st.sampled_from([BF16, np.float32]),
    profile=st.sampled_from(PROFILES),
    seed=SEED,
)
def test_combine_equals_its_body(
    tokens: int, routed: int, shared: int, channels: int, dtype: type, profile: int, seed: int
) -> None:
    """The sum over a token's experts in f32, routed and shared parts rounded before they are added."""
    rng = np.random.default_rng(seed)
    outputs = rng.standard_normal((tokens, routed + shared, channels)).astype(dtype)
    inputs = [outputs, rng.random((tokens, routed + shared)).astype(np.float32)]
    attributes: dict[str, int | float] = {"num_shared_experts": shared}
    found = run(COMBINE, inputs, attributes, profile_tokens=profile)[0].astype(np.float64)
    body = run_reference(COMBINE.operator, inputs, attributes)[0].astype(np.float64)
    exact = dtype is BF16  # sums of few bf16 products: f32 rounds them alike in any order, but for rare bf16 ties
    np.testing.assert_allclose(found, body, rtol=2.0**-6 if exact else 1e-5, atol=2.0**-7 if exact else 1e-6)
    assert not exact or (found != body).mean() < 0.01
