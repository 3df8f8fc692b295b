"""Files of token ids: what is none is told, exit code 2, by every command that takes one."""

from pathlib import Path

import pytest

from angelforge.errors import UsageError
from angelforge.tools.token_file import read_token_lists


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[99999999999999999999999]", "holds the number 99999999999999999999999"),
        ("[[1], [9223372036854775808]]", "holds the number 9223372036854775808"),
        ("[" + "9" * 5000 + "]", "is not JSON"),
        ("[true]", "something else"),
        ("[1.0]", "something else"),
        ("[", "is not JSON"),
    ],
)
def test_what_is_no_id_is_told(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "ids.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=said):
        read_token_lists(path)


def test_one_list_or_several(tmp_path: Path) -> None:
    """Ids of the full 64 bits are the model's to refuse."""
    path = tmp_path / "ids.json"
    path.write_text("[1, -9223372036854775808]")
    assert read_token_lists(path) == [[1, -(2**63)]]
    path.write_text("[[1, 2], [3]]")
    assert read_token_lists(path) == [[1, 2], [3]]
