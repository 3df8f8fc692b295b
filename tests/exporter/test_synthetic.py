"""Synthetic checkpoints: laid out as published ones, reproducible, and with values that make a useful test."""

import json
import resource
import tracemalloc
from pathlib import Path

import jinja2.sandbox
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from angelforge.checkpoint import Checkpoint
from angelforge.dtypes import DType
from angelforge.errors import AngelForgeError, UsageError
from angelforge.exporter.synthetic import FULL_CONFIG, small_config, write_checkpoint, write_sparse_checkpoint
from angelforge.exporter.synthetic_tokenizer import SPECIAL_TOKENS
from angelforge.exporter.synthetic_values import quantise_blocks
from angelforge.runtime.validate.plain_checkpoint import read_safetensors
from angelforge.runtime.validate.reference import load_reference, rms_norm

SMALL = small_config(num_hidden_layers=2, num_experts=8)


def read_all(folder):
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(read_safetensors(path))
    return tensors


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("written"), small_config())


def test_the_index_names_every_tensor_in_the_file_that_holds_it(tmp_path):
    write_checkpoint(tmp_path, SMALL, shards=3, tokenizer=False)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert names == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    held = {name: file for file in names for name in read_safetensors(tmp_path / file)}
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in read_all(tmp_path).values())


def test_the_safetensors_library_reads_the_same_values(tmp_path):
    write_checkpoint(tmp_path, SMALL, dtype="F16", tokenizer=False)
    for path in tmp_path.glob("*.safetensors"):
        own, theirs = read_safetensors(path), safetensors.numpy.load_file(path)
        assert set(own) == set(theirs)
        assert all(own[name].tobytes() == array.tobytes() for name, array in theirs.items())


def test_one_shard_is_a_single_file_without_an_index(tmp_path):
    write_checkpoint(tmp_path, SMALL, shards=1, tokenizer=False)
    found = {p.name for p in tmp_path.iterdir() if not p.name.startswith(".")}
    assert found == {"model.safetensors", "config.json", "generation_config.json"}


@pytest.mark.parametrize("shards", [1, 2, 7, 10_000])
def test_values_do_not_depend_on_the_sharding(tmp_path, shards):
    """More shards than tensors: one file for each tensor, none of them empty."""
    config = small_config(num_hidden_layers=1, vocab_size=64)
    write_checkpoint(tmp_path / "a", config, shards=shards, tokenizer=False)
    write_checkpoint(tmp_path / "b", config, shards=3, tokenizer=False)
    one, other = read_all(tmp_path / "a"), read_all(tmp_path / "b")
    assert {n: a.tobytes() for n, a in one.items()} == {n: a.tobytes() for n, a in other.items()}
    assert len(list((tmp_path / "a").glob("*.safetensors"))) == min(shards, len(one))


def test_the_seed_decides_every_value(tmp_path):
    first, again, other = (
        read_all(write_checkpoint(tmp_path / str(i), SMALL, seed=seed, tokenizer=False))
        for i, seed in enumerate((0, 0, 1))
    )
    assert all(first[name].tobytes() == again[name].tobytes() != other[name].tobytes() for name in first)


@pytest.mark.parametrize(("dtype", "code", "torch_name"), [("BF16", "BF16", "bfloat16"), ("F16", "F16", "float16")])
def test_a_narrower_type_is_the_rounding_of_the_f32_checkpoint(tmp_path, dtype, code, torch_name):
    exact = read_all(write_checkpoint(tmp_path / "exact", SMALL, dtype="F32", tokenizer=False))
    narrow = read_all(write_checkpoint(tmp_path / "narrow", SMALL, dtype=dtype, tokenizer=False))
    assert set(exact) == set(narrow)
    for name, array in narrow.items():
        expected = np.float32 if name.endswith("expert_bias") else DType(code).numpy
        assert array.dtype == expected
        np.testing.assert_array_equal(array, exact[name].astype(expected))
    assert json.loads((tmp_path / "narrow/config.json").read_text())["torch_dtype"] == torch_name


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", "FP8"])
def test_every_kind_passes_the_header_checks(tmp_path, dtype):
    config = small_config(num_hidden_layers=2, num_shared_experts=2, first_k_dense_replace=1)
    Checkpoint.open(write_checkpoint(tmp_path, config, dtype=dtype)).check()


def test_the_router_bias_can_be_stored_in_bf16(tmp_path):
    tensors = read_all(write_checkpoint(tmp_path, SMALL, bias_dtype="BF16", tokenizer=False))
    assert tensors["model.layers.1.mlp.gate.expert_bias"].dtype == DType.BF16.numpy


def test_fp8_checkpoints_quantise_linears_and_experts_only(tmp_path):
    tensors = read_all(write_checkpoint(tmp_path, SMALL, dtype="FP8"))
    quantised = {name for name, array in tensors.items() if array.dtype == DType.F8_E4M3.numpy}
    scaled = {name.removesuffix("_scale_inv") for name in tensors if name.endswith("_scale_inv")}
    assert quantised == scaled
    rest = {
        name.split(".")[-2] for name in set(tensors) - quantised if not name.endswith(("_scale_inv", "expert_bias"))
    }
    norms = {"norm", "input_layernorm", "post_attention_layernorm", "query_layernorm", "key_layernorm"}
    assert rest == {"word_embeddings", "lm_head", "gate"} | norms
    block = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (block["quant_method"], block["fmt"], block["weight_block_size"]) == ("fp8", "e4m3", [128, 128])


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 99), st.sampled_from([1e-7, 1.0, 1e6]))
def test_block_quantisation_keeps_its_rule_at_ragged_edges(rows, columns, seed, size):
    weight = np.random.default_rng(seed).standard_normal((rows, columns), np.float32) * np.float32(size)
    quantised, scale = quantise_blocks(weight)
    assert scale.shape == (-(-rows // 128), -(-columns // 128))
    for i, j in np.ndindex(scale.shape):
        block = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
        largest = np.abs(weight[block]).max()
        assert scale[i, j] == np.float32(max(largest, np.float32(1e-4))) / np.float32(448)
        back = quantised[block].astype(np.float64) * scale[i, j]
        # Half a unit in the last of three places, or half of the smallest subnormal step of 2^-9.
        allowed = np.maximum(np.abs(weight[block]) / 16, scale[i, j] * 2.0**-10)
        assert (np.abs(back - weight[block]) <= allowed * 1.0001).all()


def test_activations_and_routing_are_those_of_a_working_model(written):
    """Neither vanishing nor exploding values; every expert used; norms that are not 1."""
    trace = load_reference(written).trace(np.random.default_rng(0).integers(0, 1024, 200))
    assert all(0.5 < residual.std() < 5 for residual in trace.residuals)
    assert 1 < trace.logits.std() < 5
    for experts in trace.experts[1:]:
        share = np.bincount(experts.ravel(), minlength=16) / experts.size
        assert share.min() > 0.005
        assert share.max() < 0.25
    norm = load_reference(written).tensor("model.layers.1.input_layernorm.weight")
    assert norm.std() > 0.1


def test_masking_with_zero_instead_of_minus_infinity_would_show(written):
    """Biased scores have both signs, so that this well-known mistake changes the routing of many tokens."""
    reference = load_reference(written)
    trace = reference.trace(np.arange(200))
    x = rms_norm(trace.residuals[1], np.ones(256), 1e-6)
    gate, bias = (reference.tensor(f"model.layers.1.mlp.gate.{name}") for name in ("weight", "expert_bias"))
    biased = 1 / (1 + np.exp(-x @ gate.T)) + bias  # [200, 16]
    sums = -np.sort(-biased.reshape(-1, 4, 4))[..., :2].sum(axis=-1)  # of the best two of each group
    kept = np.repeat(sums >= np.sort(sums)[:, 2:3], 4, axis=1)
    right, wrong = (np.sort(np.argsort(-np.where(kept, biased, outside))[:, :4]) for outside in (-np.inf, 0.0))
    assert (wrong != right).any(axis=-1).mean() > 0.2


def test_the_real_model_has_the_published_counts_and_sizes_but_takes_no_disk(tmp_path):
    for fp8, count, size, shards in [(False, 24_161, 205.8e9, 42), (True, 48_129, 104.2e9, 21)]:
        folder = write_sparse_checkpoint(tmp_path / str(fp8), fp8=fp8)
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        files = list(folder.glob("*.safetensors"))
        assert len(index["weight_map"]) == count
        assert index["metadata"]["total_size"] == pytest.approx(size, rel=5e-4)
        assert len(files) == shards
        assert max(path.stat().st_size for path in files) < 5.4e9
        assert sum(path.stat().st_blocks for path in files) * 512 < 20e6
        with safetensors.safe_open(min(files), "np") as file:
            assert file.get_slice("model.word_embeddings.weight").get_shape() == [157184, 4096]


def test_memory_stays_near_one_tensor(tmp_path):
    config = small_config(vocab_size=8192, num_hidden_layers=6)  # 8 MB of embedding in f32, 43 MB in all
    tracemalloc.start()
    write_checkpoint(tmp_path, config, dtype="F32", tokenizer=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(p.stat().st_size for p in tmp_path.glob("*.safetensors")) > 40e6
    assert peak < 3 * 8.4e6


def test_an_earlier_checkpoint_leaves_nothing_behind(tmp_path):
    write_checkpoint(tmp_path, SMALL, shards=5)
    write_checkpoint(tmp_path, SMALL, shards=1)
    assert [p.name for p in tmp_path.glob("model*")] == ["model.safetensors"]


def test_a_failed_write_leaves_no_config_behind(tmp_path):
    """As on a full disk: from some byte on, the system refuses to write."""
    write_checkpoint(tmp_path, SMALL)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        with pytest.raises(AngelForgeError, match=r"Cannot write .*model-00001-of-00002"):
            write_checkpoint(tmp_path, SMALL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "config.json").exists()


def test_wrong_requests_are_refused_in_words(tmp_path):
    with pytest.raises(UsageError, match="0 shards"):
        write_checkpoint(tmp_path, SMALL, shards=0)
    with pytest.raises(UsageError, match="vocabulary of 100"):
        write_checkpoint(tmp_path, small_config(vocab_size=100))
    with pytest.raises(AngelForgeError, match="n_group"):
        write_checkpoint(tmp_path, small_config(n_group=3))
    (tmp_path / "file").write_text("")
    for write in (write_checkpoint, write_sparse_checkpoint):
        with pytest.raises(AngelForgeError, match="file"):
            write(tmp_path / "file", SMALL)


def test_the_published_figures_are_those_of_model_md():
    sizes = ("hidden_size", "num_hidden_layers", "vocab_size", "num_experts", "num_experts_per_tok", "n_group")
    assert [FULL_CONFIG[key] for key in sizes] == [4096, 32, 157184, 256, 8, 8]
    assert small_config(num_experts=32, extra=1)["num_experts"] == 32
    assert small_config()["num_experts"] == 16


@pytest.fixture(scope="module")
def tokenizer(written):
    return Tokenizer.from_file(str(written / "tokenizer.json"))


@given(text=st.text())
def test_the_tokenizer_spells_any_text(tokenizer, text):
    ids = tokenizer.encode(text).ids
    assert max(ids, default=0) < 1024
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_ids_beyond_the_tokenizer_decode_to_nothing(tokenizer):
    size = tokenizer.get_vocab_size()
    assert 300 <= size <= 1024
    assert tokenizer.decode([size, 1023]) == ""


def test_special_tokens_are_single_ids_known_to_the_config(written, tokenizer):
    ids = [tokenizer.encode(token).ids for token in SPECIAL_TOKENS]
    assert ids == [[i] for i in range(len(SPECIAL_TOKENS))]
    config = json.loads((written / "config.json").read_text())
    generation = json.loads((written / "generation_config.json").read_text())
    settings = json.loads((written / "tokenizer_config.json").read_text())
    assert tokenizer.id_to_token(config["eos_token_id"]) == settings["eos_token"]
    assert tokenizer.id_to_token(config["pad_token_id"]) == settings["pad_token"]
    assert [tokenizer.id_to_token(i) for i in generation["eos_token_id"]] == ["<|endoftext|>", "<|role_end|>"]


def test_the_chat_template_wraps_each_message_in_its_role(written):
    source = json.loads((written / "tokenizer_config.json").read_text())["chat_template"]
    template = jinja2.sandbox.ImmutableSandboxedEnvironment().from_string(source)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello\n"}]
    text = template.render(messages=messages, add_generation_prompt=True)
    system, human = "<role>SYSTEM</role>Be brief.<|role_end|>", "<role>HUMAN</role>Hello\n<|role_end|>"
    assert text == system + human + "<role>ASSISTANT</role>"
    assert template.render(messages=[{"role": "assistant", "content": "Hi"}]) == "<role>ASSISTANT</role>Hi<|role_end|>"


def test_other_checkpoints_are_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="new or empty folder"):
        write_checkpoint(tmp_path, small_config())
    assert (tmp_path / "config.json").read_text() == "{}"
