"""Which part of a model each of N ranks holds: heads, intermediate widths and vocabulary, by sizes alone.

A rank's part is described by a `ModelConfig` of its own, the same for all ranks, so that one graph serves them all.
"""

from __future__ import annotations

import dataclasses

from angelforge.config import ModelConfig
from angelforge.errors import UsageError
from angelforge.precision import Precision

RANKS = (1, 2, 4, 8)  # devices that may share a model
BLOCK = 128  # FP8 weights are cut at the borders of their scale blocks


def rank_config(config: ModelConfig, precision: Precision, ranks: int) -> ModelConfig:
    """The sizes of one of `ranks` parts; with one rank the model itself.

    Query heads, intermediate widths and the vocabulary are divided; key/value heads too, or repeated where there are
    fewer than ranks.

    Raises:
        UsageError: the sizes do not divide; the message says which, and what is possible.
    """
    if ranks == 1:
        return config
    problem = _problem(config, precision, ranks)
    if problem is not None:
        possible = ", ".join(str(n) for n in RANKS if can_split(config, precision, n))
        raise UsageError(f"The model cannot be split over {ranks} ranks: {problem}. Possible: {possible}.")
    return dataclasses.replace(
        config,
        num_attention_heads=config.num_attention_heads // ranks,
        num_key_value_heads=max(config.num_key_value_heads // ranks, 1),
        intermediate_size=config.intermediate_size // ranks if config.first_k_dense_replace else 1,
        moe_intermediate_size=config.moe_intermediate_size // ranks if config.num_moe_layers else 1,
        vocab_size=config.vocab_size // ranks,
    )


def can_split(config: ModelConfig, precision: Precision, ranks: int) -> bool:
    """Whether `rank_config` gives an answer."""
    return ranks == 1 or _problem(config, precision, ranks) is None


def _problem(c: ModelConfig, precision: Precision, ranks: int) -> str | None:
    """Why so many ranks cannot share a model; None where they can."""
    if ranks not in RANKS:
        return f"ranks are {', '.join(map(str, RANKS))}"
    if c.num_attention_heads % ranks:
        return f"it has {c.num_attention_heads} attention heads"
    if c.num_key_value_heads % ranks and ranks % c.num_key_value_heads:
        return f"it has {c.num_key_value_heads} key/value heads, which can neither be divided nor repeated evenly"
    if c.vocab_size % ranks:
        return f"it has {c.vocab_size} ids in its vocabulary"
    widths = [("intermediate width", c.intermediate_size, c.first_k_dense_replace > 0)]
    widths += [("experts' width", c.moe_intermediate_size, c.num_moe_layers > 0)]
    unit = BLOCK if precision.quantized else 1
    for name, width, used in widths:
        if used and width % (unit * ranks):
            blocks = f" ({BLOCK} is a block of FP8 scales)" if unit > 1 else ""
            return f"its {name} {width} is no multiple of {unit * ranks}{blocks}"
    queries = c.num_attention_heads // ranks * c.head_dim
    pairs = max(c.num_key_value_heads // ranks, 1) * c.head_dim
    if precision.quantized and (queries % BLOCK or pairs % BLOCK):
        return f"{queries} query and {pairs} key rows a rank are no multiples of {BLOCK}, a block of FP8 scales"
    return None
