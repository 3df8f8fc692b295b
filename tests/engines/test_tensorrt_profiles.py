"""Profiles cover every step that a runtime may take, and contradictions are refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from angelforge.engines.profiles import Profile, Range, StepLimits, make_profiles
from angelforge.errors import UsageError


@st.composite
def limits(draw: st.DrawFn) -> StepLimits:
    """Numbers that do not contradict each other."""
    max_batch, depth = draw(st.integers(1, 64)), draw(st.integers(0, 7))
    context, page_size = draw(st.integers(1, 131072)), draw(st.sampled_from([1, 16, 64]))
    width = -(-context // page_size)
    return StepLimits(
        max_tokens=draw(st.integers(max_batch * (1 + depth), 16384)),
        max_batch=max_batch,
        max_context=context,
        page_size=page_size,
        pages=draw(st.integers(width + 1, width + 100_000)),
        draft_depth=depth,
    )


@given(limits())
def test_every_step_finds_a_profile(limits: StepLimits) -> None:
    """Any number of tokens and sequences within the limits fits into the smallest profile for that many tokens."""
    profiles = make_profiles(limits)
    assert [p.tokens.most for p in profiles] == sorted(
        {n for n in (8, 64, 256) if n < limits.max_tokens} | {limits.max_tokens}
    )
    for profile in profiles:
        assert profile.tokens.least == profile.batch.least == profile.logit_rows.least == 1
        assert profile.batch.most == min(limits.max_batch, profile.tokens.most)
        assert profile.logit_rows.most == min(limits.verified_tokens, profile.tokens.most)
        assert profile.batch.tuned <= profile.tokens.tuned
        assert profile.pages_per_sequence.most * limits.page_size >= limits.max_context
        assert profile.pages.most == limits.pages
        symbols = profile.symbols()
        assert (symbols["B+1"].least, symbols["B+1"].most) == (profile.batch.least + 1, profile.batch.most + 1)


def test_tuned_for_what_a_profile_is_there_for() -> None:
    """One token; a full batch; a full batch with its draft; a full chunk of prompt."""
    profiles = make_profiles(StepLimits(8192, 32, 131072, 64, 4000, draft_depth=3))
    assert [(p.name, p.tokens.tuned) for p in profiles] == [
        ("decode-8", 1),
        ("decode-64", 32),
        ("decode-256", 128),
        ("prefill", 8192),
    ]
    assert [p.logit_rows.tuned for p in profiles] == [1, 32, 128, 32]


def test_what_decoding_never_fills_is_tuned_for_prompts() -> None:
    assert [p.tokens.tuned for p in make_profiles(StepLimits(8192, 1, 512, 64, 9))] == [1, 64, 256, 8192]


@given(limits())
def test_profiles_come_back_from_a_manifest(limits: StepLimits) -> None:
    for profile in make_profiles(limits):
        assert Profile.from_dict(json.loads(json.dumps(profile.to_dict()))) == profile


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((16, 32, 512, 64, 99, 0), r"32 sequences with 0 draft tokens each decode 32 tokens .* --max-tokens is 16"),
        ((64, 32, 512, 64, 99, 3), r"32 sequences with 3 draft tokens each decode 128 tokens"),
        ((64, 32, 512, 64, 8, 0), r"pool has 8 pages .* one sequence of 512 needs 8 and page 0 is spare"),
        ((64, 32, 512, 64, 2**25, 0), r"more than 2³¹ − 1 slots: lower --pages"),
        ((0, 1, 512, 64, 99, 0), r"max_tokens is 0, but at least 1"),
        ((64, 0, 512, 64, 99, 0), r"max_batch is 0, but at least 1"),
        ((64, 1, 512, 64, 99, -1), r"draft_depth is -1"),
    ],
)
def test_contradictions_are_refused(numbers: tuple[int, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        StepLimits(*numbers)


def test_ranges_are_in_order() -> None:
    with pytest.raises(UsageError, match="not in order"):
        Range(1, 9, 8)
