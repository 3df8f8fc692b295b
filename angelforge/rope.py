"""Rotary position embedding: inverse frequencies (with YaRN) and the cos/sin tables that a bundle carries."""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from angelforge.config_rope import RopeScaling
from angelforge.errors import UsageError

# Rows computed at a time: the f64 working memory stays at some MB for any number of positions.
_ROWS = 8192


class Rotation(Protocol):
    """What decides the rotation: a model's configuration or a draft's."""

    @property
    def rotary_dim(self) -> int:
        """Rotated values of a head."""
        ...

    @property
    def rope_theta(self) -> float:
        """The base."""
        ...

    @property
    def rope_scaling(self) -> RopeScaling | None:
        """YaRN, if any."""
        ...

    @property
    def max_position_embeddings(self) -> int:
        """Positions that it was trained for."""
        ...

    @property
    def max_context(self) -> int:
        """Positions that it may be used for."""
        ...


def inverse_frequencies(config: Rotation) -> npt.NDArray[np.float64]:
    """Radians per position of each rotated pair (i, i + rotary_dim/2), f64 [rotary_dim/2].

    Without scaling theta^(-2i/d). With YaRN, "NTK-by-parts" (Peng et al. 2023, arXiv 2309.00071, section 3.2): pairs
    that turn often keep their frequency, pairs that turn less than once over the trained length are slowed by
    `factor`, a linear ramp over the index joins them.
    """
    pairs = np.arange(config.rotary_dim // 2, dtype=np.float64)
    original = config.rope_theta ** (-2.0 * pairs / config.rotary_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return np.asarray(original)
    low, high = yarn_ramp(scaling, config.rotary_dim, config.rope_theta)
    ramp = np.clip((pairs - low) / max(high - low, 0.001), 0.0, 1.0)
    return np.asarray(original * (1.0 - ramp) + original / scaling.factor * ramp)


def yarn_ramp(scaling: RopeScaling, rotary_dim: int, theta: float) -> tuple[int, int]:
    """The pair indices between which YaRN blends: unchanged up to the first, fully interpolated from the second on.

    Pair i turns L * theta^(-2i/d) / 2 pi times over the trained length L; solved for i at `beta_fast` and `beta_slow`
    turns and rounded outwards, as the published implementation does.
    """

    def index(turns: float) -> float:
        ratio = scaling.original_max_position_embeddings / (turns * 2.0 * math.pi)
        return rotary_dim * math.log(ratio) / (2.0 * math.log(theta))

    low, high = math.floor(index(scaling.beta_fast)), math.ceil(index(scaling.beta_slow))
    return max(low, 0), min(high, rotary_dim - 1)


def rope_tables(config: Rotation, positions: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """cos and sin of every position and pair, each f32 [positions, rotary_dim/2], rounded once from f64.

    YaRN's attention factor is multiplied in. Raises UsageError if `positions` exceeds what the model covers, because
    positions beyond it give silent garbage.
    """
    if not 1 <= positions <= config.max_context:
        raise UsageError(
            f"{positions} positions were asked for, but the model covers {config.max_context}. "
            f"{too_long_remedy(config, positions)}"
        )
    frequencies = inverse_frequencies(config)
    factor = 1.0 if config.rope_scaling is None else config.rope_scaling.attention_factor
    cos = np.empty((positions, len(frequencies)), np.float32)
    sin = np.empty_like(cos)
    for start in range(0, positions, _ROWS):
        stop = min(start + _ROWS, positions)
        angles = np.arange(start, stop, dtype=np.float64)[:, None] * frequencies  # [rows, pairs]
        cos[start:stop] = np.cos(angles) * factor
        sin[start:stop] = np.sin(angles) * factor
    return cos, sin


def too_long_remedy(config: Rotation, positions: int) -> str:
    """What to do when more positions are wanted than the model covers: the exact option, or a smaller number."""
    if config.rope_scaling is not None or positions < 1:
        return f"Ask for 1 to {config.max_context}."
    factor = 1 << (max(math.ceil(positions / config.max_position_embeddings), 2) - 1).bit_length()
    return f"Ask for at most {config.max_context}, or stretch it with YaRN: --rope-scaling yarn:{factor}."
