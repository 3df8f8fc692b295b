"""Streamed text is the text of all tokens, whole characters only; tokenizers fail with a message."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tokenizers import byte_level, metaspace

from angelforge.errors import AngelForgeError
from angelforge.runtime.detokenizer import Detokenizer, TextStream
from angelforge.runtime.tokenizer import Tokenizer

BYTES, SPACES = byte_level(), metaspace()


@given(st.lists(st.one_of(st.integers(0, 262), st.sampled_from([62, 63, 128, 226, 240]))))
def test_streamed_pieces_are_the_text_of_all_tokens_also_of_invalid_bytes_and_unknown_ids(ids):
    stream = Detokenizer(BYTES)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.finish() == BYTES.decode(ids)


@given(st.text(max_size=60))
def test_valid_text_is_streamed_without_half_characters_and_with_no_delay(text):
    ids = BYTES.encode(text)
    stream, shown = Detokenizer(BYTES), ""
    for count, token in enumerate(ids, 1):
        shown += stream.push(token)
        whole = BYTES.decode(ids[:count]).rstrip("\ufffd")
        assert shown.rstrip("\ufffd") == whole
        assert text.startswith(shown)
    assert shown + stream.finish() == text


@given(st.lists(st.integers(0, 4), min_size=1, max_size=80))
def test_leading_spaces_survive_where_the_decoder_drops_only_the_first(ids):
    stream = Detokenizer(SPACES)
    assert "".join([stream.push(token) for token in ids]) + stream.finish() == SPACES.decode(ids)


def test_a_character_in_single_bytes_is_shown_when_it_is_complete():
    stream = Detokenizer(SPACES)
    begin = 5  # the token <0x00>
    assert [stream.push(begin + byte) for byte in "世".encode()] == ["", "", "世"]


@pytest.mark.parametrize("tokenizer", [BYTES, SPACES])
@given(text=st.text("世界你好éaâ🎉", max_size=60))
def test_long_text_in_single_bytes_is_streamed_as_it_is(tokenizer, text):
    """Where a decoder takes a run of bytes as a whole, too: half a character makes replacements of all of it."""
    ids = BYTES.encode(text) if tokenizer is BYTES else [5 + byte for byte in text.encode()]
    stream = Detokenizer(tokenizer)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.finish() == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(stream._window) <= 32


def test_endless_invalid_bytes_cost_the_same_at_every_step():
    stream = Detokenizer(BYTES)
    token = BYTES.encode("\xff")[0]
    shown = "".join(stream.push(token) for _ in range(500)) + stream.finish()
    assert shown == BYTES.decode([token] * 500)
    assert len(stream._window) <= 32


def test_special_tokens_are_not_text():
    end = BYTES.special_id("<|end|>")
    assert end in BYTES.special_ids
    assert BYTES.special_id("word") is None
    assert BYTES.special_id("nothing like it") is None
    stream = Detokenizer(BYTES)
    assert stream.push(end) + stream.finish() == ""


@given(st.text("stop here", max_size=40))
def test_a_stop_string_ends_the_text_of_single_byte_tokens(text):
    stream = TextStream(BYTES, ("stop",))
    shown = ""
    for token in BYTES.encode(text):
        shown += stream.push(token)
        if stream.stopped:
            break
    assert stream.stopped == ("stop" in text)
    assert shown + stream.finish() == text.split("stop")[0]


def test_a_folder_without_tokenizer_has_none(tmp_path):
    assert Tokenizer.load(tmp_path) is None


@pytest.mark.parametrize("content", ["", "{}", "[1]", json.dumps({"model": {"type": "BPE"}}), "\x00\xff"])
def test_a_broken_tokenizer_file_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content, encoding="latin-1")
    with pytest.raises(AngelForgeError, match=r"tokenizer\.json cannot be read as a tokenizer"):
        Tokenizer.load(tmp_path)


def test_truncation_and_padding_left_in_the_file_do_not_touch_prompts(tmp_path):
    library = byte_level()._tokenizer
    library.enable_truncation(3)
    library.enable_padding(length=10)
    library.save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer.load(tmp_path).encode("abcdef")) == 6
    assert len(Tokenizer.load(tmp_path).encode("a")) == 1


def test_damaged_unicode_is_refused_with_a_sentence():
    with pytest.raises(AngelForgeError, match="not valid Unicode"):
        BYTES.encode("a\udcff")
