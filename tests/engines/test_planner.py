"""The planner: against the platform page's figures, the packer's own layout, and its own promises."""

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from angelforge.config import ModelConfig
from angelforge.draft_config import DraftConfig
from angelforge.dtypes import DType
from angelforge.engines.decode_limit import decode_limit, touched_experts
from angelforge.engines.footprint import (
    Kind,
    WeightBytes,
    draft_bytes,
    draft_kv_bytes_per_token,
    kv_bytes_per_token,
    weight_bytes,
)
from angelforge.engines.planner import Plan, PlanRequest, plan
from angelforge.errors import UsageError
from angelforge.exporter.draft_layout import draft_tensors
from angelforge.exporter.layout import bundle_tensors
from angelforge.exporter.pieces import SameBytes
from angelforge.exporter.synthetic import FULL_CONFIG, small_config
from angelforge.exporter.synthetic_config import FP8_BLOCK
from angelforge.exporter.synthetic_draft import FULL_DRAFT_CONFIG
from angelforge.precision import Precision
from angelforge.targets import TARGETS, get_target

FULL = ModelConfig.from_dict(FULL_CONFIG)
FULL_FP8 = ModelConfig.from_dict({**FULL_CONFIG, "quantization_config": FP8_BLOCK})


def planned(target: str, precision: str = "fp8", config: ModelConfig = FULL_FP8, **changes: Any) -> Plan:
    """A plan of AntAngelMed."""
    values = {"max_context": config.max_context, **changes}
    return plan(PlanRequest(config, Precision(precision), get_target(target), **values))


def test_one_96_gb_h20_cannot_hold_the_fp8_model() -> None:
    """104.2 GB of weights against 102.6: two cards, the 141 GB variant or an H200 can."""
    found = planned("h20")
    assert not found.fits
    assert found.weights_total > found.memory
    assert (found.pages, found.tokens, found.left < 0) == (0, 0, True)
    assert found.problem is not None
    assert "exceed the memory by" in found.problem
    assert found.remedies == ("--tensor-parallel 2", "--target h20-141g", "--target h200")
    for options in ({"target": "h20", "tensor_parallel": 2}, {"target": "h20-141g"}, {"target": "h200"}):
        assert planned(**options).fits  # type: ignore[arg-type]


def test_bf16_on_h20_needs_four_cards_or_fp8() -> None:
    """205.8 GB; export quantises BF16 checkpoints, and FP8 ones are taken as they are."""
    assert planned("h20", "bf16", FULL).remedies == ("--tensor-parallel 4", "--precision fp8 --tensor-parallel 2")
    assert "--precision fp8 --tensor-parallel 2" in planned("h20", "bf16", FULL_FP8).remedies


def test_a_bf16_checkpoint_is_planned_in_fp8_like_an_fp8_one() -> None:
    """Export makes the same bundle of both."""
    made, stored = planned("h200", "fp8", FULL), planned("h200", "fp8", FULL_FP8)
    assert made.fits and made.to_dict() == stored.to_dict()


def test_a_context_that_is_too_long_for_the_memory_is_shortened() -> None:
    """The proposed context is tried out."""
    config = FULL_FP8.with_rope_scaling("yarn:4")
    found = planned("h200", config=config, memory_bytes=112_000_000_000)
    assert not found.fits
    remedy = next(text for text in found.remedies if text.startswith("--max-context "))
    shorter = int(remedy.split()[1])
    assert 1024 <= shorter < 131072
    assert planned("h200", config=config, memory_bytes=112_000_000_000, max_context=shorter).fits


@pytest.mark.parametrize(
    ("batch", "context", "gigabytes", "h20", "h200"),
    [
        (1, 1024, 6.26, 640, 768),
        (1, 131072, 14.8, 271, 325),
        (32, 1024, 68.9, 1857, 2228),
        (32, 4096, 75.4, 1698, 2038),
    ],
)
def test_physical_limit_of_the_platform_page(
    batch: int, context: int, gigabytes: float, h20: float, h200: float
) -> None:
    """Its table, which counts the router in bf16; the f32 router of a bundle costs one percent more."""
    exact = weight_bytes(FULL_FP8, Precision.FP8, 131072)
    half = tuple(
        WeightBytes(item.kind, item.total // 2, item.per_rank // 2) if item.kind is Kind.ROUTER else item
        for item in exact
    )
    for name, expected in (("h20", h20), ("h200", h200)):
        bandwidth = TARGETS[name].bandwidth
        assert bandwidth is not None
        like_page = decode_limit(FULL_FP8, half, 65536, bandwidth, batch, context)
        assert like_page.bytes_per_step / 1e9 == pytest.approx(gigabytes, rel=2e-3)
        assert like_page.tokens_per_second == pytest.approx(expected, rel=2e-3)
        ours = decode_limit(FULL_FP8, exact, 65536, bandwidth, batch, context)
        assert ours.tokens_per_second == pytest.approx(expected, rel=0.015)


def test_a_plan_tells_the_limits() -> None:
    """At batch 1, 8 and 32 with 1024 tokens each; none for a CPU, whose bandwidth is not known."""
    limits = planned("h20").limits
    assert [(limit.batch, limit.context) for limit in limits] == [(1, 1024), (8, 1024), (32, 1024)]
    assert limits[0].tokens_per_second == pytest.approx(640, rel=0.015)
    assert limits[2].tokens_per_second == pytest.approx(1857, rel=0.015)
    assert planned("cpu", memory_bytes=200_000_000_000).limits == ()


def test_touched_experts() -> None:
    """One token reaches k; very many reach all."""
    assert touched_experts(FULL, 1) == pytest.approx(8)
    assert touched_experts(FULL, 32) == pytest.approx(256 * (1 - (1 - 8 / 256) ** 32))
    assert touched_experts(FULL, 10_000) == pytest.approx(256)


def kinds_of(name: str, config: ModelConfig) -> list[Kind]:
    """The kinds that a bundle's tensor is counted under; a stack of experts holds routed and shared ones."""
    if name.startswith("rope."):
        return [Kind.ROPE]
    for part, kind in (
        ("norm", Kind.NORM),
        ("word_emb", Kind.EMBEDDING),
        ("lm_head", Kind.HEAD),
        (".gate.", Kind.ROUTER),
    ):
        if part in name:
            return [kind]
    if ".attention." in name:
        return [Kind.ATTENTION]
    return [Kind.ROUTED, Kind.SHARED] if ".experts." in name else [Kind.DENSE]


@given(
    experts=st.integers(1, 4),
    shared=st.integers(0, 2),
    dense=st.integers(0, 3),
    precision=st.sampled_from(Precision),
    sizes=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    flags=st.tuples(st.booleans(), st.booleans()),
)
def test_weights_by_kind_are_those_of_the_packer(
    experts: int, shared: int, dense: int, precision: Precision, sizes: tuple[int, int], flags: tuple[bool, bool]
) -> None:
    """The formulas give, kind by kind, the bytes of the tensors that the exporter lays out, for any model."""
    raw = small_config(
        num_experts=8 * experts,
        num_shared_experts=shared,
        first_k_dense_replace=dense,
        hidden_size=sizes[0],
        intermediate_size=sizes[1],
        moe_intermediate_size=128,
        use_qk_norm=flags[0],
        tie_word_embeddings=flags[1],
        quantization_config=FP8_BLOCK if precision is Precision.FP8 else None,
    )
    config = ModelConfig.from_dict(raw)
    expected = dict.fromkeys((kind for kind in Kind if not kind.drafted), 0)
    for tensor in bundle_tensors(config, precision, 500):
        if isinstance(tensor.source, SameBytes):  # a tied head: the one table is counted as the head
            expected[Kind.EMBEDDING], expected[Kind.HEAD] = 0, expected[Kind.EMBEDDING]
            continue
        kinds = kinds_of(tensor.name, config)
        slots = {Kind.ROUTED: config.num_experts, Kind.SHARED: config.num_shared_experts}
        for kind in kinds:
            share = slots[kind] / config.num_expert_slots if len(kinds) > 1 else 1
            expected[kind] += round(tensor.nbytes * share)
    assert {item.kind: item.total for item in weight_bytes(config, precision, 500)} == expected


def test_kv_bytes() -> None:
    """65,536 a token in bf16; the pool is f32 in fp32 and on a CPU, whatever the precision; ranks share heads."""
    assert kv_bytes_per_token(FULL, DType.BF16) == 65536
    assert planned("h200").kv_bytes_per_token == 65536
    assert planned("h200", "fp32").kv_bytes_per_token == 131072
    assert planned("cpu", "bf16", memory_bytes=10**12).kv_bytes_per_token == 131072
    assert planned("h20", tensor_parallel=2).kv_bytes_per_token == 32768


@given(
    memory=st.integers(10**9, 10**12),
    target=st.sampled_from([name for name, row in TARGETS.items() if row.backend != "onnxruntime"]),
    precision=st.sampled_from(Precision),
    ranks=st.sampled_from([1, 2, 4, 8]),
    context=st.integers(1, 32768),
)
def test_a_plan_never_exceeds_the_memory(
    memory: int, target: str, precision: Precision, ranks: int, context: int
) -> None:
    """What is promised fits byte for byte, nothing usable is left over, and every remedy helps."""
    request = PlanRequest(FULL_FP8, precision, get_target(target), context, ranks, memory_bytes=memory)
    found = plan(request)
    fixed = found.weights_per_rank + found.reserve_activations + found.reserve_device
    page = found.page_bytes
    assert 1.0 < page / (found.page_size * found.kv_bytes_per_token) < 1.05
    assert found.left == memory - fixed
    assert found.pages * page <= max(found.left, 0) < (found.pages + 1) * page
    assert found.tokens == max(found.pages - 1, 0) * found.page_size
    assert found.fits == (found.tokens >= context) == (found.needed <= memory) == (found.problem is None)
    assert not (found.fits and found.remedies)
    for capacity in found.capacities:
        if capacity.context > context:
            assert capacity.sequences is None
        else:
            assert capacity.sequences == found.tokens // -(-capacity.context // 64 * 64) or found.tokens == 0
    for remedy in found.remedies:
        words = remedy.split()
        options = dict(zip(words[::2], words[1::2], strict=True))
        changes: dict[str, Any] = {}
        for name, value in options.items():
            key = name.removeprefix("--").replace("-", "_")
            changes[key] = Precision(value) if key == "precision" else int(value)
        assert plan(dataclasses.replace(request, **changes)).fits


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"max_context": 32769}, "--rope-scaling yarn:2"),
        ({"max_context": 0}, "max_context"),
        ({"tensor_parallel": 3}, "Possible: 1, 2, 4, 8"),
        ({"tensor_parallel": 16}, "Possible: 1, 2, 4, 8"),
        ({"tensor_parallel": 0}, "tensor_parallel"),
        ({"page_size": 0}, "page_size"),
        ({"memory_bytes": 0}, "memory"),
    ],
)
def test_impossible_requests_are_wrong_use(changes: dict[str, Any], told: str) -> None:
    """Whatever the memory."""
    with pytest.raises(UsageError, match=told):
        planned("h20", **changes)


def test_a_cpu_needs_its_memory_and_has_one_rank() -> None:
    """The table of targets cannot know either."""
    with pytest.raises(UsageError, match="memory"):
        planned("cpu")
    with pytest.raises(UsageError, match="one rank"):
        planned("cpu", memory_bytes=10**12, tensor_parallel=2)


def test_ranks_share_weights_and_talk() -> None:
    """Two H20: half of the bytes and 66 sums a step, some 700 tokens/s at batch 1 (the platform page)."""
    one, two, eight = (planned("h200", tensor_parallel=n) for n in (1, 2, 8))
    assert 0.49 < two.weights_per_rank / one.weights_per_rank < 0.51
    assert (two.kv_bytes_per_token, eight.kv_bytes_per_token) == (32768, 16384)  # at 8, key/value heads are repeated
    assert one.limits[0].communication.calls == 0
    first, last = two.limits[0].communication, two.limits[-1].communication
    assert first.calls == last.calls == 66
    assert last.nbytes == 32 * first.nbytes == 32 * (65 * 4096 * 2 + 157184 * 4)  # at two ranks each sends all of it
    assert first.seconds == pytest.approx(66 * 10e-6 + first.nbytes / 450e9)
    assert planned("h20", tensor_parallel=2).limits[0].tokens_per_second == pytest.approx(700, rel=0.03)


def test_fp8_splits_keep_whole_scale_blocks() -> None:
    """Experts of width 128 cannot be cut in two in FP8; in bf16 they can, and no remedy proposes what cannot be."""
    raw = small_config(moe_intermediate_size=128, intermediate_size=512)
    config = ModelConfig.from_dict(raw)
    assert planned("h20", "bf16", config, tensor_parallel=2).fits
    with pytest.raises(UsageError, match="experts' width 128 is no multiple of 256"):
        planned("h20", "fp8", config, tensor_parallel=2)
    assert not planned("h20", "bf16", config, tensor_parallel=2, memory_bytes=1000).remedies


def test_slots_stay_int32() -> None:
    """A tiny model on a large card: no more tokens than a slot number can name."""
    config = ModelConfig.from_dict(small_config(num_hidden_layers=1, num_key_value_heads=1, head_dim=8))
    found = planned("h200", "bf16", config)
    assert found.pages * found.page_size <= 2**31


def test_to_dict_is_json() -> None:
    """All figures, with names for kinds."""
    saved = json.loads(json.dumps(planned("h20", tensor_parallel=2).to_dict()))
    assert saved["fits"] is True
    assert saved["weights"][5]["kind"] == "routed experts"
    assert saved["weights"][5]["split"] is True
    assert saved["weights_per_rank"] == sum(item["per_rank"] for item in saved["weights"])


def draft_of(**changes: Any) -> DraftConfig:
    """A draft for AntAngelMed, of the size that is published for it."""
    return DraftConfig.from_dict({**FULL_DRAFT_CONFIG, **changes}, FULL)


RAGGED = {"head_dim": 80, "intermediate_size": 14400}


@pytest.mark.parametrize("changes", [{}, {"fc_norm": True}, {"num_key_value_heads": 2}, RAGGED])
def test_a_drafts_weights_are_those_of_the_bundle(changes: dict[str, Any]) -> None:
    """Byte for byte what export writes for it."""
    draft = draft_of(**changes)
    for precision in Precision:
        written = sum(math.prod(t.shape) * t.dtype.itemsize for t in draft_tensors(draft, precision, 4096))
        assert sum(item.total for item in draft_bytes(draft, precision, 4096)) == written
    assert draft_kv_bytes_per_token(draft, DType.BF16) == 2 * 2 * draft.num_key_value_heads * draft.head_dim


def test_a_draft_takes_weights_and_pages() -> None:
    """What it needs is missing from the target's cache: its weights once, and its keys and values for every page."""
    draft = draft_of()
    without, found = planned("h20-141g"), planned("h20-141g", draft=draft)
    weights = draft_bytes(draft, Precision.FP8, FULL.max_context)
    assert without.left - found.left == sum(item.total for item in weights)
    assert found.page_bytes - without.page_bytes == 64 * draft_kv_bytes_per_token(draft, DType.BF16)
    assert found.weights[-2:] == weights
    assert found.limits == without.limits  # they are those of a token a step; a round with a draft gives more
    assert found.pages < without.pages


def test_a_built_engine_tells_its_activations() -> None:
    """They take the place of the estimate, but not in what is tried as a remedy."""
    found = planned("h200", activations=123_000_000)
    assert (found.reserve_activations, found.activations_known) == (123_000_000, True)
    assert not planned("h200").activations_known
    assert planned("h20", activations=123_000_000).remedies == planned("h20").remedies
