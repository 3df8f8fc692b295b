"""Rotary position embedding in a configuration: width, base and YaRN, in every spelling that checkpoints use."""

from __future__ import annotations

import math
from dataclasses import dataclass

from angelforge.config_json import Section
from angelforge.errors import AngelForgeError, UsageError


@dataclass(frozen=True)
class RopeScaling:
    """YaRN (Peng et al. 2023, arXiv 2309.00071): the only scaling that this model family uses.

    `attention_factor` multiplies cos and sin; the softmax scale is unchanged.
    """

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    @property
    def positions(self) -> int:
        """Positions that the stretched model covers: factor times the trained length."""
        return int(self.factor * self.original_max_position_embeddings)


@dataclass(frozen=True)
class Rope:
    """What a configuration says about positions: rotated width of a head, base, and YaRN if any."""

    rotary_dim: int
    theta: float
    scaling: RopeScaling | None


def yarn_attention_factor(factor: float) -> float:
    """0.1 ln(factor) + 1: equation 22 of the YaRN paper; 1.138629 for factor 4."""
    return 0.1 * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def parse_rope_scaling(request: str, max_position_embeddings: int) -> RopeScaling:
    """``yarn:4`` as on the command line: YaRN by that factor over the trained length."""
    kind, _, amount = request.partition(":")
    try:
        factor = float(amount)
    except ValueError:
        factor = math.nan
    if kind != "yarn" or not 1.0 < factor <= 1024.0:
        raise UsageError(f"Rope scaling is {request!r}, but yarn:FACTOR with a factor above 1 is needed: yarn:4.")
    return RopeScaling(factor, max_position_embeddings, yarn_attention_factor(factor))


def read_rope(config: Section, head_dim: int) -> Rope:
    """Reads `rotary_dim`, `partial_rotary_factor`, `rope_theta` and YaRN from where old and new Transformers put them.

    Newer Transformers hold all of them in `rope_parameters`; a value given twice must agree.
    """
    blocks = [block for key in ("rope_scaling", "rope_parameters") if (block := config.section(key)) is not None]
    places = [config, *blocks]
    return Rope(_rotary_dim(places, head_dim), _agreed(places, "rope_theta"), _read_scaling(blocks))


def _agreed(places: list[Section], key: str, required: bool = True) -> float:
    """The value of `key` wherever it stands; two different values are an error. NaN if absent and not required."""
    found = {place.source: place.number(key) for place in places if place.get(key) is not None}
    if len(set(found.values())) > 1:
        told = " and ".join(f"{value:g} in {source}" for source, value in found.items())
        raise AngelForgeError(f"{key} is contradictory: {told}. Keep the one that the model was trained with.")
    if not found and required:
        places[0].fail(key, "a number greater than 0 (here or in rope_parameters)")
    return next(iter(found.values()), math.nan)


def _rotary_dim(places: list[Section], head_dim: int) -> int:
    """The rotated width of a head: `rotary_dim`, or `partial_rotary_factor` times `head_dim`."""
    config = places[0]
    width = config.integer("rotary_dim", default=None, least=2)
    factor = _agreed(places, "partial_rotary_factor", required=False)
    if math.isnan(factor):
        if width is None:
            config.fail("partial_rotary_factor", "partial_rotary_factor or rotary_dim (0.5 for AntAngelMed)")
        return int(width)
    product = int(head_dim * factor)
    if width not in (None, product):
        raise AngelForgeError(
            f"{config.source}: rotary_dim is {width}, but partial_rotary_factor {factor:g} of head_dim {head_dim} "
            f"gives {product}. Keep the one that the model was trained with."
        )
    return product


def _read_scaling(blocks: list[Section]) -> RopeScaling | None:
    found = [scaling for block in blocks if (scaling := _read_block(block)) is not None]
    if len(found) == 2 and found[0] != found[1]:
        raise AngelForgeError(f"{blocks[0].source} and {blocks[1].source} describe two different scalings: keep one.")
    return found[0] if found else None


def _read_block(block: Section) -> RopeScaling | None:
    """One `rope_scaling` or `rope_parameters` object; None if it scales nothing."""
    kinds = {kind for key in ("rope_type", "type") if (kind := block.text(key, "")) != ""}
    if len(kinds) > 1:
        raise AngelForgeError(f"{block.source}: rope_type and type differ ({' and '.join(sorted(kinds))}): keep one.")
    kind = kinds.pop() if kinds else "default"
    if kind == "default":
        if block.get("factor") not in (None, 1, 1.0):
            block.fail("rope_type", "yarn, the only scaling that uses a factor and is supported,")
        _refuse_unread(block)
        return None
    if kind != "yarn":
        raise AngelForgeError(
            f"{block.source}: the type {kind!r} is not supported; AngelForge knows 'yarn' and 'default'."
        )
    return _read_yarn(block)


def _read_yarn(block: Section) -> RopeScaling:
    factor = block.number("factor")
    if not 1.0 <= factor <= 1024.0:
        block.fail("factor", "a factor from 1 to 1024")
    original = block.integer("original_max_position_embeddings")
    mscale, mscale_all = (block.number(key, default=0.0, above=-1.0) for key in ("mscale", "mscale_all_dim"))
    if mscale and mscale_all:  # Transformers ignores one without the other
        block.fail("mscale_all_dim", "an explicit attention_factor in place of mscale and mscale_all_dim")
    if not block.boolean("truncate", True):
        block.fail("truncate", "true (the ramp ends at whole indices)")
    scaling = RopeScaling(
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=block.number("attention_factor", default=yarn_attention_factor(factor)),
        beta_fast=block.number("beta_fast", default=32.0),
        beta_slow=block.number("beta_slow", default=1.0),
    )
    if scaling.beta_fast <= scaling.beta_slow:
        block.fail("beta_fast", f"a number greater than beta_slow ({scaling.beta_slow:g})")
    _refuse_unread(block)
    return scaling


def _refuse_unread(block: Section) -> None:
    # Everything in this object is mathematics, so nothing in it may be ignored.
    if unknown := list(block.unread()):
        raise AngelForgeError(f"{block.source} has keys that AngelForge does not know: {', '.join(unknown)}.")
