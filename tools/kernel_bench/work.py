"""What is measured: every operator that has a kernel, with the sizes of a model and the tokens of a step."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from angelforge.config import ModelConfig
from angelforge.plugins.operator import Operator
from angelforge.plugins.paged_attention.operator import SPLIT_LENGTH, SPLIT_QUERIES
from angelforge.plugins.registry import OPERATORS

TOKENS = (1, 8, 32, 128, 1024, 8192)
PAGE_SIZE = 64
K = 1024
WITHOUT_KERNEL = ("AllReduce",)  # removed for one rank, a native layer for several
F32, BF16 = 1, 16  # onnx.TensorProto
ROPE_POSITIONS = 32768

Dims = dict[str, int]


@dataclass(frozen=True)
class Sequences:
    """The sequences of a step, each with its keys before the step and its new tokens."""

    name: str
    items: tuple[tuple[int, int], ...]  # (history, tokens)

    @property
    def tokens(self) -> int:
        """T of the step."""
        return sum(tokens for _, tokens in self.items)

    @property
    def lengths(self) -> list[int]:
        """Keys of each sequence after the step."""
        return [history + tokens for history, tokens in self.items]


CONTEXTS = (
    *(Sequences(f"{size // K}K", ((size - 1, 1),)) for size in (K, 8 * K, 32 * K, 128 * K)),
    Sequences("128K beside 31 at 4K", ((128 * K - 1, 1), *[(4 * K - 1, 1)] * 31)),
    Sequences("prompt of 8K", ((0, 8 * K),)),
)


@dataclass(frozen=True)
class Work:
    """One call of one operator. `dims` holds the symbols of its inputs."""

    operator: Operator
    label: str  # which of the model's calls: "qkv", "head", "128K"
    dims: Mapping[str, int]
    attributes: Mapping[str, int | float]
    sequences: Sequences | None = None  # of attention
    shared: int = 0  # experts that every token takes

    @property
    def tokens(self) -> int:
        """T."""
        return self.dims["T"]

    @property
    def name(self) -> str:
        """For tables: operator, call and tokens."""
        label = f" {self.label}" if self.label else ""
        return f"{self.operator.name}{label}, T = {self.tokens}"

    def sizes(self) -> dict[str, int]:
        """The symbols that weights fix: what a row of the tuning table names."""
        steps = {"T", "B", "B1", "P", "C", "pages", "words"}
        return {symbol: size for symbol, size in self.dims.items() if symbol not in steps}


def works(config: ModelConfig, tokens: Sequence[int] = TOKENS, contexts: Sequence[Sequences] = CONTEXTS) -> list[Work]:
    """Every operator with a kernel at these tokens; attention and its merge at these contexts. The heaviest first."""
    found = [_work(config, *row, count) for row in _rows(config) for count in tokens]
    found += [work for sequences in contexts for work in attention_works(config, sequences)]
    order = {name: i for i, name in enumerate(_ORDER)}
    return sorted(found, key=lambda work: order.get(work.operator.name, len(order)))


# What matters most, for runs that are cut short.
_ORDER = (
    "Fp8MoEGateUp", "Fp8MoEDown", "PagedAttention", "MoERoute", "Fp8Linear", "Fp8GateUp", "Linear", "MoELogits",
    "AttentionMergeQuantize", "AddNormQuantize", "QKVPrepare", "MoECombine", "AttentionMerge", "NormQuantize",
    "MoEGateUp", "MoEDown", "GateUp",
)  # fmt: skip


def _blocks(size: int) -> int:
    return -(-size // 128)


def _rows(config: ModelConfig) -> Iterator[tuple[str, str, Dims, dict[str, Any]]]:
    """(operator, call, sizes that weights fix, attributes) of the calls that a step makes."""
    hidden, dense, width = config.hidden_size, config.intermediate_size, config.moe_intermediate_size
    slots, per_token = config.num_expert_slots, config.experts_per_token
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    epsilon = {"epsilon": config.rms_norm_eps}
    yield "Embedding", "", {"V": config.vocab_size, "H": hidden}, {"dtype": BF16}
    for name in ("Norm", "AddNorm", "NormQuantize", "AddNormQuantize"):
        yield name, "", {"H": hidden}, epsilon
    linears = (("qkv", hidden, config.qkv_size), ("dense", heads * dim, hidden), ("down", dense, hidden))
    for label, depth, channels in linears:
        blocks = {"KG": _blocks(depth), "NG": _blocks(channels)}
        yield "Fp8Linear", label, {"K": depth, "N": channels, **blocks}, {"dtype": BF16}
        yield "Linear", label, {"K": depth, "N": channels}, {"dtype": BF16}
    yield "Linear", "head", {"K": hidden, "N": config.vocab_size}, {"dtype": F32}
    yield "GateUp", "", {"H": hidden, "F": dense}, {}
    yield "Fp8GateUp", "", {"H": hidden, "F": dense, "HG": _blocks(hidden), "FG": _blocks(dense)}, {}
    yield "MoELogits", "", {"H": hidden, "E": config.num_experts}, {}
    route = {
        "top_k": config.num_experts_per_tok,
        "n_group": config.n_group,
        "topk_group": config.topk_group,
        "num_shared_experts": config.num_shared_experts,
        "routed_scaling_factor": config.routed_scaling_factor,
    }
    yield "MoERoute", "", {"E": config.num_experts}, route
    experts = {"E": slots, "I": width, "H": hidden, "k": per_token}
    scales = {"HG": _blocks(hidden), "IG": _blocks(width)}
    yield "MoEGateUp", "", experts, {}
    yield "MoEDown", "", experts, {}
    yield "Fp8MoEGateUp", "", {**experts, **scales}, {}
    yield "Fp8MoEDown", "", {**experts, **scales}, {"dtype": BF16}
    yield "MoECombine", "", {"k": per_token, "H": hidden}, {"num_shared_experts": config.num_shared_experts}
    qkv = {"W": config.qkv_size, "D": dim, "P": ROPE_POSITIONS, "R2": config.rotary_dim // 2, "Hkv": kv_heads}
    rotate = {"num_heads": heads, "num_kv_heads": kv_heads, "rotary_dim": config.rotary_dim}
    yield "QKVPrepare", "", {**qkv, "page_size": PAGE_SIZE}, {**rotate, **epsilon}
    yield "QKVRotate", "", {**qkv, "page_size": PAGE_SIZE}, rotate


def _work(config: ModelConfig, name: str, label: str, sizes: Dims, attributes: dict[str, Any], tokens: int) -> Work:
    steps = {"T": tokens}
    if name.endswith(("MoEGateUp", "MoEDown")):
        steps["words"] = -(-tokens // 128) * 4
    if name.startswith("QKV"):
        steps["pages"] = -(-tokens // PAGE_SIZE) + 1
    return Work(OPERATORS[name], label, {**sizes, **steps}, attributes, shared=config.num_shared_experts)


def attention_works(config: ModelConfig, sequences: Sequences) -> list[Work]:
    """PagedAttention over these sequences, and the two merges of what it leaves."""
    lengths, batch = sequences.lengths, len(sequences.items)
    needed = [-(-length // PAGE_SIZE) for length in lengths]
    pages = 1 + sum(needed)
    heads = {"Hq": config.num_attention_heads, "D": config.head_dim}
    step = {"T": sequences.tokens, "B": batch, "B1": batch + 1}
    pool = {"Hkv": config.num_key_value_heads, "page_size": PAGE_SIZE, "pages": pages, "P": max(needed)}
    split = {"split_length": SPLIT_LENGTH}
    attributes = {"scale": config.head_dim**-0.5, **split, "split_queries": SPLIT_QUERIES}
    rows = (pages * PAGE_SIZE // SPLIT_LENGTH + batch) * SPLIT_QUERIES
    found = [Work(OPERATORS["PagedAttention"], sequences.name, {**heads, **pool, **step}, attributes, sequences)]
    for name in ("AttentionMerge", "AttentionMergeQuantize"):
        found.append(Work(OPERATORS[name], sequences.name, {**heads, **step, "C": rows}, split, sequences))
    return found
