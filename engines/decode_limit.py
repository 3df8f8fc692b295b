"""The physical limit of decoding: how fast memory alone lets tokens come, whatever the kernels are."""

from __future__ import annotations

from dataclasses import dataclass

from angelforge.config import ModelConfig
from angelforge.engines.communication import NOTHING, Communication
from angelforge.engines.footprint import Kind, WeightBytes


@dataclass(frozen=True)
class DecodeLimit:
    """Tokens per second of all sequences together if every byte is read once at nominal bandwidth.

    One token of each sequence a step, without a draft: a round that accepts several reads no less, and gives more.

    Between ranks also what they send each other, one after the other with the reading.
    """

    batch: int
    context: int
    bytes_per_step: int  # on each rank
    tokens_per_second: float
    communication: Communication = NOTHING


def touched_experts(config: ModelConfig, tokens: int) -> float:
    """Expected number of routed experts of a layer that `tokens` tokens reach: E (1 - (1 - k/E)^n)."""
    missed = (1.0 - config.num_experts_per_tok / config.num_experts) ** tokens
    return config.num_experts * (1.0 - missed)


def decode_limit(
    config: ModelConfig,
    weights: tuple[WeightBytes, ...],
    kv_per_token: int,
    bandwidth: float,
    batch: int,
    context: int,
    sent: Communication = NOTHING,
    experts: float | None = None,
) -> DecodeLimit:
    """The limit at `batch` sequences that each hold `context` tokens; `kv_per_token` is that of one rank.

    Read each step: all weights but the embedding and tables (rows of them are looked up), of the routed
    experts `experts` a layer (None: as many as random routing reaches), and the whole cache of every sequence. `sent`
    is what ranks tell each other.
    """
    per_rank = {item.kind: item.per_rank for item in weights}
    always = sum(n for kind, n in per_rank.items() if not kind.looked_up and kind is not Kind.ROUTED)
    touched = touched_experts(config, batch) if experts is None else experts
    routed = per_rank[Kind.ROUTED] * touched / config.num_experts
    nbytes = always + routed + batch * context * kv_per_token
    seconds = nbytes / bandwidth + sent.seconds
    return DecodeLimit(batch, context, round(nbytes), batch / seconds, sent)
