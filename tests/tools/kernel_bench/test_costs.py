"""What a run measures, and its bytes and FLOP against numbers computed by hand."""

import pytest

from angelforge.config import ModelConfig
from angelforge.exporter.synthetic_config import FULL_CONFIG
from angelforge.plugins.registry import OPERATORS
from angelforge.targets import get_target
from angelforge.tools.kernel_bench.checks import has_kernel
from angelforge.tools.kernel_bench.costs import cost_of
from angelforge.tools.kernel_bench.goals import Goal, goal_of, target_of
from angelforge.tools.kernel_bench.work import CONTEXTS, TOKENS, WITHOUT_KERNEL, Work, works

CONFIG = ModelConfig.from_dict(FULL_CONFIG)
ROUTED_ONLY = ModelConfig.from_dict({**FULL_CONFIG, "num_shared_experts": 0})
H20, H200 = get_target("h20"), get_target("h200")


def one(name: str, label: str = "", tokens: int = 1, config: ModelConfig = CONFIG) -> Work:
    """The only call of that operator, label and number of tokens."""
    found = [w for w in works(config, (tokens,)) if w.operator.name == name and w.label == label]
    assert len(found) == 1
    return found[0]


def test_every_operator_with_a_kernel_is_measured() -> None:
    """At every number of tokens, and attention at every context."""
    found = {(w.operator.name, w.tokens) for w in works(CONFIG)}
    attention = {"PagedAttention", "AttentionMerge", "AttentionMergeQuantize"}
    expected = {name for name in OPERATORS if name not in WITHOUT_KERNEL}
    assert {name for name, operator in OPERATORS.items() if has_kernel(operator)} <= expected
    assert {name for name, _ in found} == expected
    assert {(name, t) for name in expected - attention for t in TOKENS} <= found
    assert {w.label for w in works(CONFIG) if w.operator.name == "PagedAttention"} == {c.name for c in CONTEXTS}


@pytest.mark.parametrize(
    ("tokens", "experts", "h20", "h200"),
    [(1, 8, 25, 21), (32, 163.31, 514, 428), (128, 251.6, 791, 660)],  # U(n) = 256·(1 − (1 − 8/256)ⁿ)
)
def test_routed_experts_of_a_layer(tokens: int, experts: float, h20: int, h200: int) -> None:
    """The µs of PLATFORM.md: 12.583 MB for each expert; activations add little."""
    layer = [one(name, tokens=tokens, config=ROUTED_ONLY) for name in ("Fp8MoEGateUp", "Fp8MoEDown")]
    weights = sum(cost_of(work, 1).nbytes - cost_of(work, 0).nbytes for work in layer)
    scales = 3 * 4 * 32 * 8  # an f32 for each 128×128
    assert weights == 3 * 4096 * 1024 + scales
    assert round(experts * (weights - scales) / 4.0e12 * 1e6) == h20
    assert round(experts * (weights - scales) / 4.8e12 * 1e6) == h200
    rest = sum(cost_of(work, 0).nbytes for work in layer)
    per_entry = 2 * (1024 + 32) + 2 * 4096  # inner written and read, expert_out written
    assert rest == tokens * (4096 + 128 + 8 * per_entry + 2 * 32) + 2 * 256 * -(-tokens // 128) * 16


def test_shared_expert_is_one_more() -> None:
    """28 µs on an H20 at one token."""
    layer = [cost_of(one(name), 9) for name in ("Fp8MoEGateUp", "Fp8MoEDown")]
    assert round(sum(c.nbytes for c in layer) / 4.0e12 * 1e6) == 28
    assert layer[0].flops == 2 * layer[1].flops == 4 * 9 * 4096 * 1024


def test_head_and_attention() -> None:
    """322 and 268 µs for the head, 67 and 56 µs for one layer's attention over 128K keys."""
    head = cost_of(one("Linear", "head"))
    assert [round(head.seconds(t.bandwidth or 0, t.bf16_flops or 0) * 1e6) for t in (H20, H200)] == [322, 268]
    assert head.flops == 2 * 4096 * 157184
    work = next(w for w in works(CONFIG) if w.operator.name == "PagedAttention" and w.label == "128K")
    cost, keys = cost_of(work), 131072 * 2 * 4 * 128 * 2
    assert keys == 268435456
    assert [round(keys / bandwidth * 1e6) for bandwidth in (4.0e12, 4.8e12)] == [67, 56]
    partial = 512 * 32 * 129 * 4  # 512 parts of f32 and one logarithm a head
    assert 0 < cost.nbytes - keys - partial < 2e4  # the page table and one query
    assert cost.flops == 4 * 131072 * 32 * 128


def test_prompts_are_causal() -> None:
    """Half of the square of scores; all of it direct."""
    work = next(w for w in works(CONFIG) if w.operator.name == "PagedAttention" and w.tokens == 8192)
    assert cost_of(work).flops == 4 * (8192 * 8193 // 2) * 32 * 128


def test_only_used_rows_of_tables_count() -> None:
    embedding = cost_of(one("Embedding", tokens=8)).nbytes
    assert embedding == 8 * (8 + 2 * 2 * 4096)
    prepare = cost_of(one("QKVPrepare", tokens=8)).nbytes
    assert prepare == 8 * 2 * (5120 + 4096 + 1024) + 2 * 2 * 128 + 8 * 2 * 32 * 4 + 2 * 8 * 4 + 4


@pytest.mark.parametrize(
    ("name", "memory", "target"),
    [
        ("NVIDIA H20", 102e9, "h20"),
        ("NVIDIA H20", 150e9, "h20-141g"),
        ("NVIDIA H200", 150e9, "h200"),
        ("NVIDIA H100 80GB HBM3", 85e9, "h100"),
        ("NVIDIA GeForce RTX 4090", 25e9, "rtx4090"),
        ("NVIDIA A100-SXM4-80GB", 85e9, None),
        ("", 1, None),
    ],
)
def test_gpus_are_known_by_name(name: str, memory: float, target: str | None) -> None:
    found = target_of(name, int(memory))
    assert (found.name if found else None) == target


def test_goals_of_the_issue() -> None:
    assert goal_of(one("Fp8MoEGateUp"), H200) == Goal("achievable", 0.70)
    assert goal_of(one("Fp8MoEDown", tokens=32), None) == Goal("achievable", 0.88)
    assert goal_of(one("MoERoute", tokens=64), None) == Goal("us", 4.0)
    assert goal_of(one("Fp8Linear", "qkv", 8192), H20) == Goal("peak", 0.75)
    assert goal_of(one("Fp8Linear", "qkv", 8192), H200) == Goal("peak", 0.40)
    assert goal_of(one("Fp8Linear", "qkv", 8192), None) is goal_of(one("Linear", "qkv"), H200) is None
    assert Goal("us", 3).met(2.9) and not Goal("us", 3).met(3.1)
    assert Goal("peak", 0.4).met(0.4) and not Goal("peak", 0.4).met(0.39)
    assert (str(Goal("us", 3)), str(Goal("achievable", 0.7))) == ("≤ 3 µs", "≥ 70 % achievable")
