"""Deltas that came at once are told as one."""

from hypothesis import given
from hypothesis import strategies as st

from angelforge.runtime.call import merged
from angelforge.runtime.logprobs import TokenLogprob
from angelforge.runtime.request import Delta

PIECES = st.lists(
    st.tuples(st.integers(0, 3), st.text(max_size=3), st.lists(st.integers(0, 9), max_size=2)), max_size=20
)


@given(PIECES, st.booleans())
def test_nothing_is_lost_and_each_request_is_told_once(pieces: list[tuple[int, str, list[int]]], told: bool) -> None:
    deltas = [
        Delta(index, text, tuple(ids), logprobs=tuple(TokenLogprob(i, -1.0, ()) for i in ids) if told else None)
        for index, text, ids in pieces
    ]
    found = merged(deltas)
    assert len({delta.index for delta in found}) == len(found)
    for index in range(4):
        mine = [delta for delta in deltas if delta.index == index]
        for delta in (delta for delta in found if delta.index == index):
            assert delta.text == "".join(one.text for one in mine)
            assert delta.token_ids == tuple(token for one in mine for token in one.token_ids)
            if told:
                assert [found.token for found in delta.logprobs] == list(delta.token_ids)
            else:
                assert delta.logprobs is None
    assert {delta.index for delta in found} == {delta.index for delta in deltas}
