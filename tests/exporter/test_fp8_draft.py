"""Drafts in FP8: stored as the rule says, computed as it rounds, taken over from FP8 checkpoints; outputs stay."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from support.built import relative_error
from support.bundles import folder_tensors
from support.draft_references import load_draft_reference, load_fp8_draft_reference

from angelforge import LLM, SamplingParams
from angelforge.bundle import Bundle
from angelforge.engines.cpu import build_cpu
from angelforge.errors import AngelForgeError
from angelforge.exporter.export import ExportOptions, export
from angelforge.exporter.synthetic import small_config, write_checkpoint
from angelforge.exporter.synthetic_draft import small_draft_config, write_draft
from angelforge.exporter.synthetic_values import quantise_blocks
from angelforge.precision import Precision
from angelforge.runtime.onnxruntime_draft import OnnxRuntimeDraft
from angelforge.runtime.onnxruntime_engine import OnnxRuntimeEngine
from angelforge.runtime.packing import Piece, pack
from angelforge.runtime.validate.draft_reference import DraftReference, DraftStep
from angelforge.runtime.validate.plain_checkpoint import checkpoint_tensors
from angelforge.tools.cli import main
from angelforge.tools.toy import DRAFT, MODEL

ATTENTION, MLP = "midlayer.self_attn.", "midlayer.mlp."
QUANTISED = {
    "NormQuantize": 2,  # token, state
    "Fp8Linear": 4,  # q, k and v of each; o; down
    "AttentionMergeQuantize": 1,
    "AddNormQuantize": 1,
    "Fp8GateUp": 1,
}
#: With it plain decoding alone and in a batch of 24 said different tokens of the toy in FP8, on an AMD EPYC.
NONSENSE = "mjl ri fibunkx ztpnf uskatb dhfofg zf pdx jkjtkh"
Sizes = dict[str, Any]
#: Target and draft: whole blocks but for k and v, which share one; nothing a multiple of anything; FP8 as it comes.
PAIRS: dict[str, tuple[Sizes, Sizes, Any]] = {
    "quantised": ({}, {}, "BF16"),
    "ragged": (
        {"hidden_size": 200},
        {"head_dim": 40, "num_attention_heads": 6, "intermediate_size": 330, "fc_norm": True, "norm_output": True},
        "BF16",
    ),
    "an FP8 checkpoint": ({}, {"head_dim": 64}, "FP8"),
}


class Pair:
    """A random target and draft in an FP8 bundle, loaded."""

    def __init__(self, folder: Path, target: Sizes, draft: Sizes, dtype: Any) -> None:
        config = small_config(num_experts=8, num_hidden_layers=2, **target)
        self.checkpoint = write_checkpoint(folder / "checkpoint", config)
        captured = {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1]}}
        drafted = small_draft_config(config, **captured, **draft)
        self.folder = write_draft(folder / "draft", self.checkpoint, drafted, dtype=dtype)
        options = ExportOptions(precision=Precision.FP8, draft=str(self.folder))
        self.bundle = export(str(self.checkpoint), folder / "bundle", options)
        build_cpu(self.bundle)
        self.stored = folder_tensors(self.bundle.folder / "weights")


@pytest.fixture(scope="module", params=PAIRS.values(), ids=PAIRS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp("pair"), *request.param)


def expected_weights(source: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(name, e4m3, scales) of every quantised weight, made of the draft's tensors, FP8 or not."""
    stacked = {
        end: np.concatenate([source[f"{ATTENTION}{part}_proj.weight{end}"] for part in "qkv"])
        for end in ("", "_scale_inv")
        if f"{ATTENTION}q_proj.weight{end}" in source
    }
    for end, whole in stacked.items():
        for half, values in zip(("token", "state"), np.split(whole, 2, axis=1), strict=True):
            source[f"{ATTENTION}qkv_proj.{half}.weight{end}"] = np.ascontiguousarray(values)
    names = [f"{ATTENTION}qkv_proj.token", f"{ATTENTION}qkv_proj.state", f"{ATTENTION}o_proj"]
    for name in [*names, *(f"{MLP}{part}_proj" for part in ("gate", "up", "down"))]:
        weight, scale = source[f"{name}.weight"], source.get(f"{name}.weight_scale_inv")
        quantised = (weight, scale) if scale is not None else quantise_blocks(weight.astype(np.float32))
        yield f"draft.{name}.weight", *quantised


def test_what_is_stored_is_quantised_by_the_rule(pair: Pair) -> None:
    """Codes and scales bit for bit, q, k and v as one matrix for each half; FP8 weights as they come."""
    for name, codes, scales in expected_weights(folder_tensors(pair.folder)):
        np.testing.assert_array_equal(pair.stored[name].view(np.uint8), codes.view(np.uint8), err_msg=name)
        np.testing.assert_array_equal(pair.stored[f"{name}_scale_inv"], scales, err_msg=name)


def test_fc_head_and_norms_are_not_quantised(pair: Pair) -> None:
    source = checkpoint_tensors(pair.folder)
    for name in ("fc.weight", "lm_head.weight", "norm.weight", "midlayer.hidden_norm.weight"):
        found = pair.stored[f"draft.{name}"]
        assert found.dtype.name == "bfloat16"
        np.testing.assert_array_equal(found, source(name).astype(found.dtype), err_msg=name)


def test_the_bundle_says_so(pair: Pair) -> None:
    """Manifest and report; the graph passes ONNX's checker."""
    manifest = Bundle.open(pair.bundle.folder).manifest
    assert manifest.draft is not None and manifest.draft.quantization is not None
    kinds = json.loads((pair.bundle.folder / "quantization.json").read_text())["kinds"]
    counted = sum(codes.size for _, codes, _ in expected_weights(folder_tensors(pair.folder)))
    quantised_here = "quantization_config" not in json.loads((pair.folder / "config.json").read_text())
    assert kinds.get("draft", {}).get("weights") == (counted if quantised_here else None)
    path = str(pair.bundle.folder / "draft.onnx")
    onnx.checker.check_model(path, full_check=True)
    found = Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)
    assert {name: count for name, count in found.items() if "Quantize" in name or "Fp8" in name} == QUANTISED
    assert found["Linear"] == 1  # the head


def steps(pair: Pair) -> tuple[list[np.ndarray], list[np.ndarray], list[DraftStep], np.ndarray]:
    """Of three sequences: ids, the target's states, the engine's steps (logits and cache); all tokens proposed."""
    engine = OnnxRuntimeEngine(pair.bundle, 8)
    draft = OnnxRuntimeDraft(pair.bundle, engine)
    all_ids = [np.random.default_rng(seed).integers(2, 1000, 25) for seed in range(3)]
    pages = [np.array([page], np.int32) for page in (3, 1, 5)]
    engine.forward(pack([Piece(ids[:-1], 0, page, 0) for ids, page in zip(all_ids, pages, strict=True)], 64))
    states = np.split(engine.draft_hidden.numpy().copy(), 3)
    made = pack([Piece(ids[1:], 0, page, 24) for ids, page in zip(all_ids, pages, strict=True)], 64)
    proposed = draft.follow(made, np.arange(72))
    logits = np.split(draft.logits().copy(), 3)
    cached = [draft.pool[page[0]].swapaxes(1, 2)[:, :24].copy() for page in pages]  # [2, 24, kv_heads, D]
    draft.close()
    engine.close()
    found = [DraftStep(rows, rows, *kv) for rows, kv in zip(logits, cached, strict=True)]
    return all_ids, states, found, proposed


def errors(pair: Pair, reference: DraftReference, taken: Any) -> np.ndarray:
    """[3 · 24]: how far each position's row is from the reference's, given the same states."""
    found = []
    for ids, states, step in zip(*taken[:3], strict=True):
        expected = reference.step(ids[1:], states, 0)
        for one, other in ((step.logits, expected.logits), (step.keys, expected.keys), (step.values, expected.values)):
            apart = np.abs(one - other).reshape(24, -1).max(axis=1)
            found.append(apart / np.abs(other).reshape(24, -1).max(axis=1))
    return np.array(found)


def test_a_step_rounds_as_the_reference_does(pair: Pair) -> None:
    """But for values so near the middle of two e4m3 values that a sum decides; unrounded, no row is equal."""
    taken = steps(pair)
    reference = load_fp8_draft_reference(pair.folder, pair.checkpoint)
    found = errors(pair, reference, taken)  # [sequences · (logits, keys, values), 24]
    assert found.max() < 0.1
    assert (found < 2e-5).mean() > 0.6
    plain = errors(pair, load_draft_reference(pair.folder, pair.checkpoint), taken)
    assert np.median(plain) > 1e-2 and plain.min() > 2e-3
    best = [step.logits.argmax(axis=1) for step in taken[2]]
    np.testing.assert_array_equal(taken[3], reference.target_ids()[np.concatenate(best)])


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
def test_an_fp8_draft_is_widened_for_other_bundles(tmp_path: Path, precision: Precision) -> None:
    """Its weights times their scales, each rounded once; the target may be anything."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint", small_config(num_experts=8, num_hidden_layers=3))
    draft = write_draft(tmp_path / "draft", checkpoint, dtype="FP8")
    bundle = export(str(checkpoint), tmp_path / "bundle", ExportOptions(precision=precision, draft=str(draft)))
    assert bundle.manifest.draft is not None and bundle.manifest.draft.quantization is None
    found, source = folder_tensors(bundle.folder / "weights"), checkpoint_tensors(draft)
    for name in ("fc", f"{ATTENTION}o_proj", f"{MLP}down_proj"):
        np.testing.assert_array_equal(
            found[f"draft.{name}.weight"], source(f"{name}.weight").astype(precision.activation.numpy)
        )
    whole = np.concatenate([source(f"{ATTENTION}{part}_proj.weight") for part in "qkv"])
    assert relative_error(found[f"draft.{ATTENTION}qkv_proj.weight"].astype(np.float32), whole) < 2**-8


def test_scales_that_cannot_be_stacked_are_refused(tmp_path: Path) -> None:
    """64 rows of keys: the scales of k and v would share a block, and they are not the same ones."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint", small_config(num_experts=8, num_hidden_layers=3))
    draft = write_draft(tmp_path / "draft", checkpoint, dtype="FP8")
    with pytest.raises(AngelForgeError, match=r"key rows are 64.*--precision bf16"):
        export(str(checkpoint), tmp_path / "bundle", ExportOptions(precision=Precision.FP8, draft=str(draft)))
    assert not (tmp_path / "bundle").exists()


def test_a_weight_that_is_no_number_is_named_in_its_own_tensor(tmp_path: Path) -> None:
    """k stands in the middle of the matrix that is quantised; what is told is where it stands in the checkpoint."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint", small_config(num_experts=8, num_hidden_layers=3))
    draft = write_draft(tmp_path / "draft", checkpoint)
    path, name = draft / "model.safetensors", f"{ATTENTION}v_proj.weight"
    data = bytearray(path.read_bytes())
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    at = 8 + size + header[name]["data_offsets"][0] + 2 * (7 * 512 + 300)
    data[at : at + 2] = b"\x80\x7f"  # infinity in bf16
    path.write_bytes(data)
    with pytest.raises(AngelForgeError, match=r"draft\.midlayer\.self_attn\.v_proj\.weight at \[7, 300\] is inf"):
        export(str(checkpoint), tmp_path / "bundle", ExportOptions(precision=Precision.FP8, draft=str(draft)))


def test_every_token_is_the_best_of_its_verification(tmp_path: Path) -> None:
    """The toy in FP8, greedily, several calls at once, one of them nonsense whose experts nearly tie.

    Exactly so by the logits of the call that verified it, on any processor. Plain decoding sums in another order there,
    and e4m3 may round otherwise: the plain logits of the whole text name the same token but for a few, which are
    counted. The quantised draft is still right, and validated.
    """
    bundle = export(str(MODEL), tmp_path / "bundle", ExportOptions(precision=Precision.FP8, draft=str(DRAFT)))
    build_cpu(bundle)
    calls = ["I have a cough for 4 days. I am 34 years old.", "What is triage?", "My chest hurts. I am 61."]
    same: list[bool] = []
    with LLM(bundle.folder, speculate=4) as llm:
        prompts = [llm.chat_prompt([{"role": "user", "content": call}]) for call in calls]
        outs = llm.generate([*prompts, NONSENSE], SamplingParams(max_tokens=40, logprobs=1))
        for out in outs:
            assert out.logprobs is not None
            assert [step.top[0][0] for step in out.logprobs] == list(out.token_ids)
            best = llm.score([*out.prompt_token_ids, *out.token_ids]).argmax(axis=1)
            same += list(best[len(out.prompt_token_ids) - 1 : -1] == np.array(out.token_ids))
        report = llm.speculation
    assert np.mean(same) > 0.97 and len(same) > 100
    result = CliRunner().invoke(main, ["validate", str(bundle.folder), "--draft", "--random", "1", "--length", "30"])
    assert result.exit_code == 0, result.output
    assert report is not None and report.accepted_length is not None and report.accepted_length > 2.5
