"""The FP8 reference rounds what FP8 rounds, and nothing else."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fp8 import dequantised, nearest_code, quantise_by_definition

from angelforge.exporter.synthetic import small_config, write_checkpoint
from angelforge.runtime.validate.fp8_reference import (
    Fp8Reference,
    load_fp8_reference,
    quantised_activation,
    quantised_weight,
)
from angelforge.runtime.validate.plain_checkpoint import checkpoint_config, checkpoint_tensors, is_quantised


@given(st.integers(1, 5), st.integers(1, 300), st.integers(-40, 40), st.integers(0, 2**32 - 1))
def test_activations_are_scaled_by_token_and_128_channels(tokens, channels, exponent, seed):
    x = (np.random.default_rng(seed).standard_normal((tokens, channels)) * 2.0**exponent).astype(np.float32)
    for token, row in enumerate(quantised_activation(x.astype(np.float64))):
        for begin in range(0, channels, 128):
            part = x[token : token + 1, begin : begin + 128]
            scale = np.maximum(np.abs(part).max(), np.float32(1e-10)) / np.float32(448)
            wanted = dequantised(nearest_code(part / scale), np.full((1, 1), scale))
            np.testing.assert_array_equal(row[None, begin : begin + 128], wanted)


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 2**32 - 1))
def test_weights_are_scaled_by_block(rows, columns, seed):
    weight = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    np.testing.assert_array_equal(quantised_weight(weight), dequantised(*quantise_by_definition(weight)))


def test_zeros_stay_zero():
    assert (quantised_activation(np.zeros((2, 200))) == 0).all()


def test_only_projections_are_rounded(tmp_path):
    """Norms, router, embedding and head are the checkpoint's; slices of shared experts are rounded apart."""
    raw = small_config(num_hidden_layers=2, moe_intermediate_size=72, num_shared_experts=2)
    folder = write_checkpoint(tmp_path, raw, tokenizer=False)
    plain, reference = checkpoint_tensors(folder), load_fp8_reference(folder)
    names = ["model.layers.1.mlp.gate.weight", "model.norm.weight", "lm_head.weight", "model.word_embeddings.weight"]
    for name in [*names, "model.layers.1.attention.query_layernorm.weight"]:
        assert not is_quantised(name)
        np.testing.assert_array_equal(reference.tensor(name), plain(name).astype(np.float64))
    down = plain("model.layers.1.mlp.shared_experts.down_proj.weight")
    halves = [quantised_weight(down[:, begin : begin + 72]) for begin in (0, 72)]
    found = reference.tensor("model.layers.1.mlp.shared_experts.down_proj.weight")
    np.testing.assert_array_equal(found, np.concatenate(halves, axis=1))
    assert (found != quantised_weight(down)).any()


def test_the_weights_of_fp8_checkpoints_are_taken_as_they_are(tmp_path):
    folder = write_checkpoint(tmp_path, small_config(num_hidden_layers=1), dtype="FP8", tokenizer=False)
    name = "model.layers.0.mlp.gate_proj.weight"
    np.testing.assert_array_equal(load_fp8_reference(folder).tensor(name), checkpoint_tensors(folder)(name))


def test_the_definition_gives_the_fp8_twin(tmp_path):
    """A model stored in f32 and quantised here, and its FP8 checkpoint: the same logits where only that differs."""
    raw = small_config(num_hidden_layers=1, vocab_size=64)
    stored, exact = (write_checkpoint(tmp_path / t, raw, dtype=t, tokenizer=False) for t in ("FP8", "F32"))
    tensors = {True: checkpoint_tensors(exact), False: checkpoint_tensors(stored)}
    mixed = Fp8Reference(checkpoint_config(exact), lambda name: tensors[is_quantised(name)](name))
    ids = [3, 1, 4, 1, 5]
    assert mixed.logits(ids) == pytest.approx(load_fp8_reference(stored).logits(ids), abs=1e-5)
