"""What decides where a request goes: prompts that begin alike."""

import json

import pytest

from angelforge.runtime.replicas.envelope import prefix_of

SYSTEM = {"role": "system", "content": "You are a nurse."}


def chat(*turns: tuple[str, str]) -> bytes:
    """The body of a chat request."""
    return json.dumps({"messages": [SYSTEM, *({"role": role, "content": text} for role, text in turns)]}).encode()


def test_all_turns_of_a_conversation_go_together() -> None:
    """The second turn repeats the first: its cache is where the first one was."""
    first = chat(("user", "I fell."))
    later = chat(("user", "I fell."), ("assistant", "When?"), ("user", "Today."))
    assert prefix_of(first) == prefix_of(later) != ""
    assert prefix_of(chat(("user", "I cough."))) != prefix_of(first)


@pytest.mark.parametrize("prompt", ["a" * 5000, ["a" * 5000], list(range(5000))])
def test_long_prompts_with_one_begin_go_together(prompt: object) -> None:
    """Texts, lists of them, and token ids."""
    body = json.dumps({"prompt": prompt}).encode()
    longer = json.dumps({"prompt": prompt + prompt[-2:]}).encode()  # type: ignore[operator,index]
    assert prefix_of(body) == prefix_of(longer) != ""


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b"\xff", b'{"messages": []}', b'{"messages": [3]}', b"{}", b"[" * 100_000]
)
def test_nonsense_goes_anywhere(body: bytes) -> None:
    """A replica refuses it in its own words."""
    assert isinstance(prefix_of(body), str)
