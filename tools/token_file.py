"""Files of token ids: JSON, a list of ids or a list of such lists."""

from __future__ import annotations

import json
from pathlib import Path

from angelforge.diskerrors import explained
from angelforge.errors import UsageError


def read_token_lists(path: Path) -> list[list[int]]:
    """The lists of ids in a file; a single list counts as one. Raises AngelForgeError saying what is wrong with it."""
    with explained("read", path):
        raw = path.read_bytes()
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON: {error}. A list of token ids was expected, such as [1, 2, 3].") from None
    lists = value if isinstance(value, list) and any(isinstance(item, list) for item in value) else [value]
    for ids in lists:
        if not isinstance(ids, list) or not all(type(item) is int for item in ids):  # type(): true is an int, too
            raise UsageError(f"{path} holds something else than a list of token ids, or a list of such lists.")
        wrong = next((item for item in ids if not -(2**63) <= item < 2**63), None)
        if wrong is not None:
            raise UsageError(f"{path} holds the number {wrong}, which is no token id; those have 64 bits at most.")
    return lists
