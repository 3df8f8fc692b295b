"""Stop strings are found wherever the text is cut, and nothing of them is shown."""

import tracemalloc

from hypothesis import given
from hypothesis import strategies as st

from angelforge.runtime.stops import StopFilter

# Also longer ones than those whose begins are listed, built of few parts so that texts hold their begins.
LONG = st.lists(st.sampled_from(["ab", "a" * 20, "ab" * 17, "b"]), min_size=1, max_size=4).map("".join)
STOPS = st.lists(st.text("ab", min_size=1, max_size=4) | LONG, max_size=3).map(tuple)
PIECES = st.lists(st.text("abc", max_size=4) | LONG, max_size=10)


def expected(text, stops):
    """The text before the stop string that is complete first (the longest of those); None if there is none."""
    for end in range(1, len(text) + 1):
        begins = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if begins:
            return text[: min(begins)]
    return None


@given(PIECES, STOPS)
def test_the_output_ends_before_the_first_stop_string_however_the_text_is_cut(pieces, stops):
    text = "".join(pieces)
    wanted = expected(text, stops)
    stream = StopFilter(stops)
    shown = "".join(stream.push(piece) for piece in pieces)
    assert stream.stopped == (wanted is not None)
    assert shown + stream.finish() == (text if wanted is None else wanted)


@given(PIECES, STOPS)
def test_text_is_held_back_only_while_it_can_become_a_stop_string(pieces, stops):
    stream, seen, shown = StopFilter(stops), "", ""
    for piece in pieces:
        seen, shown = seen + piece, shown + stream.push(piece)
        if not stream.stopped:
            held = seen[len(shown) :]
            assert seen.startswith(shown)
            assert not held or any(stop.startswith(held) and stop != held for stop in stops)


def test_a_long_begin_is_held_back():
    """Whatever its length, also one of which no end begins a stop string by itself."""
    stop = "x" + "y" * 50
    for size in range(1, len(stop)):
        stream = StopFilter((stop,))
        assert stream.push(stop[:size]) == ""
        assert stream.push(stop[size:] + "z") == ""
        assert stream.stopped


def test_a_long_stop_string_takes_memory_for_itself_only():
    """Anyone who may ask a server can send one of megabytes; a list of its begins would have as many terabytes."""
    tracemalloc.start()
    stream = StopFilter(("a" * 4_000 + "b",))
    assert stream.push("c" + "a" * 100) + stream.push("aac") == "c" + "a" * 102 + "c"
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()
