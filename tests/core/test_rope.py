"""YaRN and the cos/sin tables, against the published figures and the paper's formula in its own words."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from angelforge.config import ModelConfig
from angelforge.errors import UsageError
from angelforge.exporter.synthetic import FULL_CONFIG
from angelforge.rope import inverse_frequencies, rope_tables, too_long_remedy, yarn_ramp

PLAIN = ModelConfig.from_dict(FULL_CONFIG)
YARN = PLAIN.with_rope_scaling("yarn:4")


def test_published_figures() -> None:
    """At 64 rotated values and base 600000 the ramp runs from pair 12 to 21, and the attention factor is 1.138629."""
    assert YARN.rope_scaling is not None
    assert yarn_ramp(YARN.rope_scaling, 64, 600000.0) == (12, 21)
    assert YARN.rope_scaling.attention_factor == pytest.approx(1.138629, abs=5e-7)


def test_plain_frequencies() -> None:
    """theta^(-2i/d): 1 for the first pair, falling by the same ratio."""
    frequencies = inverse_frequencies(PLAIN)
    assert frequencies.shape == (32,)
    assert frequencies.dtype == np.float64
    assert frequencies[0] == 1.0
    np.testing.assert_allclose(frequencies[1:] / frequencies[:-1], 600000.0 ** (-1 / 32), rtol=1e-14)


def test_yarn_keeps_fast_pairs_and_slows_slow_ones() -> None:
    """Up to the ramp unchanged, from its end divided by the factor, between them a linear blend."""
    ratio = inverse_frequencies(YARN) / inverse_frequencies(PLAIN)
    np.testing.assert_array_equal(ratio[:13], 1.0)
    np.testing.assert_allclose(ratio[21:], 0.25, rtol=1e-15)
    blend = [1 - Fraction(3, 4) * Fraction(i - 12, 9) for i in range(12, 22)]
    np.testing.assert_allclose(ratio[12:22], [float(value) for value in blend], rtol=1e-14)


@given(
    factor=st.floats(1.5, 64.0),
    original=st.integers(256, 1 << 20),
    theta=st.floats(1e3, 1e7),
    rotary=st.integers(2, 64).map(lambda n: 2 * n),
)
def test_ramp_ends_stand_where_pairs_turn_32_times_and_once(
    factor: float, original: int, theta: float, rotary: int
) -> None:
    """By definition: the pair at the lower end turns at least beta_fast times, the one at the upper at most once."""
    c = ModelConfig.from_dict(
        {**FULL_CONFIG, "rope_theta": theta, "head_dim": 128, "rotary_dim": rotary, "partial_rotary_factor": None}
        | {"rope_scaling": {"type": "yarn", "factor": factor, "original_max_position_embeddings": original}}
        | {"max_position_embeddings": min(original, 1 << 24)}
    )
    assert c.rope_scaling is not None
    low, high = yarn_ramp(c.rope_scaling, rotary, theta)

    def turns(pair: int) -> float:
        return original * theta ** (-2 * pair / rotary) / (2 * math.pi)

    assert low == 0 or turns(low) >= 32 * (1 - 1e-9)
    assert turns(low + 1) <= 32 * (1 + 1e-9)
    assert high == rotary - 1 or turns(high) <= 1 + 1e-9
    ratio = inverse_frequencies(c) / theta ** (-2 * np.arange(rotary // 2) / rotary)
    assert np.all(np.diff(ratio) <= 1e-12)
    assert np.all((ratio >= (1 - 1e-12) / factor) & (ratio <= 1 + 1e-12))


@pytest.mark.parametrize("config", [PLAIN, YARN])
def test_tables_are_rounded_once_from_f64(config: ModelConfig) -> None:
    """Every entry is the f32 nearest to cos and sin (times the attention factor) of position times frequency."""
    positions = config.max_context
    cos, sin = rope_tables(config, positions)
    assert cos.shape == sin.shape == (positions, 32)
    assert cos.dtype == sin.dtype == np.float32
    scale = config.rope_scaling.attention_factor if config.rope_scaling else 1.0
    frequencies = inverse_frequencies(config)
    for position in (0, 1, 8191, 8192, positions - 1):  # also on both sides of a block's border
        angles = [position * f for f in frequencies.tolist()]
        expected = np.array([math.cos(a) * scale for a in angles]), np.array([math.sin(a) * scale for a in angles])
        np.testing.assert_allclose(cos[position], expected[0], rtol=0, atol=1.2 * 2**-24)
        np.testing.assert_allclose(sin[position], expected[1], rtol=0, atol=1.2 * 2**-24)


def test_fewer_positions_are_a_prefix() -> None:
    """The table does not depend on how many positions are asked for."""
    for whole, part in zip(rope_tables(YARN, 20000), rope_tables(YARN, 9000), strict=True):
        np.testing.assert_array_equal(whole[:9000], part)


@pytest.mark.parametrize(
    ("positions", "option"), [(32769, "yarn:2"), (65536, "yarn:2"), (65537, "yarn:4"), (131072, "yarn:4")]
)
def test_positions_beyond_the_model_are_refused_with_the_option_that_adds_them(positions: int, option: str) -> None:
    """Without YaRN a long context gives silent garbage; the option in the message makes it possible."""
    with pytest.raises(UsageError, match=f"--rope-scaling {option}"):
        rope_tables(PLAIN, positions)
    assert PLAIN.with_rope_scaling(option).max_context >= positions


def test_positions_beyond_yarn_and_below_one_are_refused() -> None:
    """No option helps there."""
    for positions in (131073, 0, -1):
        with pytest.raises(UsageError, match="131072"):
            rope_tables(YARN, positions)
        assert "yarn" not in too_long_remedy(YARN, positions)
