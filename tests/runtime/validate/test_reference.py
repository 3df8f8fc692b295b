"""The reference itself: hand-computed values, and properties that any correct model of this kind has."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from angelforge import rope
from angelforge.config import ModelConfig
from angelforge.exporter.synthetic import FULL_CONFIG, small_config, write_checkpoint
from angelforge.runtime.validate.plain_checkpoint import dequantise
from angelforge.runtime.validate.reference import (
    Reference,
    attention_factor,
    causal_attention,
    inverse_frequencies,
    load_reference,
    rms_norm,
    rope_tables,
    rotate,
    route,
)

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
IDS = np.random.default_rng(5).integers(0, 1024, 40)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return load_reference(write_checkpoint(tmp_path_factory.mktemp("small"), small_config(), tokenizer=False))


def test_a_model_small_enough_for_paper_gives_the_paper_result():
    """One token, one head, one dense layer, hidden size 2."""
    one, zero = np.ones(2), np.zeros((2, 2))
    layer = "model.layers.0."
    tensors = {
        "model.word_embeddings.weight": np.array([[0.0, 0.0], [2.0, 2.0]]),
        layer + "input_layernorm.weight": one,  # (2, 2) → (1, 1)
        layer + "attention.query_key_value.weight": np.concatenate([zero, zero, np.eye(2)]),  # value = (1, 1)
        layer + "attention.dense.weight": 2 * np.eye(2),  # + (2, 2) → (4, 4)
        layer + "post_attention_layernorm.weight": one,  # → (1, 1)
        layer + "mlp.gate_proj.weight": np.eye(2) * math.log(3),  # silu(ln 3) = ln 3 · 3/4
        layer + "mlp.up_proj.weight": np.eye(2) * 4,  # → 3 ln 3
        layer + "mlp.down_proj.weight": np.eye(2),  # + 3 ln 3
        "model.norm.weight": np.array([1.0, 3.0]),  # → (1, 3)
        "lm_head.weight": np.array([[1.0, 2.0], [5.0, -1.0]]),
    }
    sizes = {"hidden_size": 2, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    other = {"head_dim": 2, "rotary_dim": 2, "rope_theta": 10000.0, "rms_norm_eps": 0.0, "use_qk_norm": False}
    trace = Reference({**sizes, **other, "first_k_dense_replace": 1}, tensors.__getitem__).trace([1])
    np.testing.assert_allclose(trace.residuals[1], [[4 + 3 * math.log(3)] * 2], rtol=1e-14)
    np.testing.assert_allclose(trace.logits, [[7.0, 2.0]], rtol=1e-14)


def test_attention_weighs_values_by_the_softmax_of_scaled_products():
    key = np.array([[[0.0, 0.0, 0.0, 0.0]], [[2 * math.log(3), 0.0, 0.0, 0.0]]])  # [2, 1, 4]; 2 = √head_dim
    value = np.array([[[4.0, 0, 0, 0]], [[0, 8.0, 0, 0]]])
    query = np.ones((2, 1, 4))
    out = causal_attention(query, key, value, np.array([0, 1]))
    np.testing.assert_allclose(out[:, 0], [[4, 0, 0, 0], [1, 6, 0, 0]], atol=1e-14)


def test_heads_share_kv_heads_in_runs():
    rng = np.random.default_rng(0)
    query, key, value = rng.normal(size=(5, 6, 8)), rng.normal(size=(5, 2, 8)), rng.normal(size=(5, 2, 8))
    spread = causal_attention(query, np.repeat(key, 3, axis=1), np.repeat(value, 3, axis=1), np.arange(5))
    np.testing.assert_array_equal(causal_attention(query, key, value, np.arange(5)), spread)


def test_rotation_pairs_a_dimension_with_the_one_half_the_rotary_width_later():
    x = np.array([[[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]])  # rotary width 4: pairs (0, 2) and (1, 3)
    quarter = rotate(x, np.array([[0.0, 1.0]]), np.array([[1.0, 0.0]]))  # the first pair by 90 degrees
    np.testing.assert_array_equal(quarter, [[[-3.0, 2.0, 1.0, 4.0, 5.0, 6.0]]])


def test_a_token_changes_nothing_before_it(reference):
    changed = IDS.copy()
    changed[25] = (changed[25] + 1) % 1024
    before, after = reference.logits(IDS), reference.logits(changed)
    np.testing.assert_allclose(after[:25], before[:25], atol=1e-10)
    assert np.abs(after[25:] - before[25:]).max(axis=-1).min() > 1e-3


def test_only_distances_between_positions_count(reference):
    np.testing.assert_allclose(reference.logits(IDS, np.arange(40) + 300), reference.logits(IDS), atol=1e-9)
    assert np.abs(reference.logits(IDS, np.arange(40) * 2) - reference.logits(IDS)).max() > 1e-2


def test_single_precision_stays_within_the_projects_tolerance(reference, tmp_path):
    single = Reference(reference.config, reference.tensor, np.float32).logits(IDS)
    exact = reference.logits(IDS)
    assert single.dtype == np.float32
    assert np.abs(single - exact).max() < 2e-5 * np.abs(exact).max()


def test_routing_of_paper_size():
    """Four experts in two groups; the second group wins by its sum although the first holds the best expert."""
    logits = np.log(np.array([[9.0, 1 / 9, 3.0, 4.0]]))  # scores 0.9, 0.1, 0.75, 0.8
    routing = route(logits, np.zeros(4), groups=2, kept_groups=1, top_k=2, scaling=2.5)
    np.testing.assert_array_equal(routing.experts, [[3, 2]])
    np.testing.assert_allclose(routing.weights, [[2.5 * 0.8 / 1.55, 2.5 * 0.75 / 1.55]])
    np.testing.assert_allclose(routing.margins, [0.55])


def test_experts_outside_the_kept_groups_lose_even_to_negative_scores():
    logits, bias = np.zeros((1, 4)), np.array([0.0, -5.0, -1.0, -1.0])  # biased 0.5, -4.5, -0.5, -0.5
    routing = route(logits, bias, groups=2, kept_groups=1, top_k=2, scaling=1.0)
    np.testing.assert_array_equal(routing.experts, [[2, 3]])
    np.testing.assert_allclose(routing.weights, [[0.5, 0.5]])


def test_a_single_expert_is_weighted_by_its_score_unnormalised():
    routing = route(np.log([[3.0, 1.0]]), np.zeros(2), groups=1, kept_groups=1, top_k=1, scaling=2.5)
    np.testing.assert_allclose(routing.weights, [[2.5 * 0.75]])


@given(st.data())
def test_routing_invariants(data):
    groups, size = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 8))
    kept = data.draw(st.integers(1, groups))
    top_k = data.draw(st.integers(1, kept * size))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    logits, bias = rng.normal(size=(7, groups * size)) * 3, rng.normal(size=groups * size)
    options = {"groups": groups, "kept_groups": kept, "top_k": top_k, "scaling": 2.5}
    routing = route(logits, bias, **options)
    assert all(len(set(row)) == top_k for row in routing.experts)
    assert all(len(set(row // size)) <= kept for row in routing.experts)
    assert (routing.weights > 0).all()
    if top_k > 1:
        np.testing.assert_allclose(routing.weights.sum(axis=-1), 2.5)
    shifted = route(logits, bias + 4.0, **options)
    np.testing.assert_array_equal(np.sort(shifted.experts), np.sort(routing.experts))
    np.testing.assert_allclose(np.sort(shifted.weights), np.sort(routing.weights))


def test_yarn_of_the_real_model_has_the_published_figures():
    config = {**FULL_CONFIG, "rope_scaling": YARN}
    assert attention_factor(config) == pytest.approx(1.138629, abs=5e-7)
    ratio = inverse_frequencies(config) / inverse_frequencies(FULL_CONFIG)
    assert ratio.shape == (32,)
    np.testing.assert_allclose(ratio[:13], 1.0)  # the ramp begins at 12 and ends at 21
    assert (np.diff(ratio[12:22]) < 0).all()
    np.testing.assert_allclose(ratio[21:], 0.25)
    cos, sin = rope_tables(config, np.array([0]))
    np.testing.assert_allclose(cos, 1.1386294361)
    np.testing.assert_array_equal(sin, 0.0)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}},
        {
            "rope_theta": 10000,
            "head_dim": 128,
            "partial_rotary_factor": 1.0,
            "max_position_embeddings": 4096,
            "rope_scaling": {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096, "beta_fast": 16},
        },
    ],
)
def test_the_products_rotary_tables_agree(changes):
    raw = small_config(**changes)
    config = ModelConfig.from_dict(raw)
    np.testing.assert_allclose(rope.inverse_frequencies(config), inverse_frequencies(raw), rtol=1e-14)
    for product, own in zip(rope.rope_tables(config, 500), rope_tables(raw, np.arange(500)), strict=True):
        np.testing.assert_array_equal(product, own.astype(np.float32))


def test_the_product_config_object_means_the_same_as_the_json():
    raw = small_config(rope_scaling={"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 512})
    model = Reference(ModelConfig.from_dict(raw), dict.__getitem__)
    for read in (inverse_frequencies, attention_factor):
        np.testing.assert_allclose(read(model.config), read(raw))


def test_an_fp8_checkpoint_is_the_same_model_up_to_its_rounding(tmp_path):
    config = small_config(hidden_size=192, moe_intermediate_size=72)  # blocks with ragged edges
    exact = load_reference(write_checkpoint(tmp_path / "f32", config, dtype="F32", tokenizer=False))
    rounded = load_reference(write_checkpoint(tmp_path / "fp8", config, dtype="FP8", tokenizer=False))
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    error = np.abs(rounded.tensor(name) - exact.tensor(name)) / np.abs(exact.tensor(name)).max()
    assert 0 < error.max() < 1 / 16


def test_dequantisation_applies_each_blocks_own_scale():
    out = dequantise(np.ones((130, 260), np.float32), np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], np.float32))
    assert [out[0, 0], out[0, 128], out[127, 259], out[128, 127], out[129, 255], out[129, 256]] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "changes",
    [
        {"n_group": 2, "topk_group": 1, "num_experts": 6, "num_experts_per_tok": 3},
        {"head_dim": 64, "num_key_value_heads": 1, "partial_rotary_factor": 0.25},
        {"num_shared_experts": 3},
        {"num_shared_experts": 0, "num_experts_per_tok": 1},
        {"first_k_dense_replace": 2, "tie_word_embeddings": True},
        {"use_qk_norm": False, "n_group": 1, "topk_group": 1},
    ],
    ids=str,
)
def test_other_shapes_run_and_are_traced_in_full(tmp_path, changes):
    config = small_config(**{"num_hidden_layers": 3, "vocab_size": 300, **changes})
    trace = load_reference(write_checkpoint(tmp_path, config, tokenizer=False)).trace(IDS % 300)
    assert trace.logits.shape == (40, 300)
    assert np.isfinite(trace.logits).all()
    assert len(trace.residuals) == 4
    assert [e is None for e in trace.experts] == [layer < config["first_k_dense_replace"] for layer in range(3)]
    assert trace.experts[2].shape == trace.weights[2].shape == (40, config["num_experts_per_tok"])
    assert trace.keys[0].shape == trace.values[0].shape == (40, config["num_key_value_heads"], config["head_dim"])


def test_several_shared_experts_are_slices_of_one_wide_mlp(tmp_path):
    """The product stacks them as experts of weight 1."""
    reference = load_reference(write_checkpoint(tmp_path, small_config(num_shared_experts=2), tokenizer=False))
    prefix = "model.layers.1.mlp.shared_experts."
    gate, up, down = (reference.tensor(f"{prefix}{part}_proj.weight") for part in ("gate", "up", "down"))
    x = rms_norm(np.random.default_rng(0).normal(size=(4, 256)), np.ones(256), 1e-6)
    halves = []
    for rows in (slice(0, 128), slice(128, 256)):
        gated = x @ gate[rows].T
        halves.append((gated / (1 + np.exp(-gated)) * (x @ up[rows].T)) @ down[:, rows].T)
    whole = x @ gate.T
    whole = (whole / (1 + np.exp(-whole)) * (x @ up.T)) @ down.T
    np.testing.assert_allclose(sum(halves), whole, atol=1e-12)
