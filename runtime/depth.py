"""How many tokens a draft proposes for a request: a fixed number, or as many as its own acceptance makes worth it."""

from __future__ import annotations

from typing import Literal

from angelforge.errors import UsageError

Depth = int | Literal["auto"]

#: What one more proposal costs, as a part of a target call: a draft step, and experts that only its token visits. A
#: proposal is worth making while its chance to come out is above that.
WORTH = 0.3
_FIRST_GUESS = 0.7  # acceptance that a request begins with
_NEWEST = 0.1  # weight of the newest check in the running mean
_PAUSE = 8  # where nothing is worth it, one proposal is tried every so many tokens
_HOPELESS = 0.05  # and below this the draft is given up


def check_depth(depth: object, most: int, limited_by: str) -> Depth:
    """`depth` if it is "auto" or a whole number from 0 to `most`; raises UsageError if not."""
    if depth == "auto":
        return "auto"
    if type(depth) is int and 0 <= depth <= most:
        return depth
    raise UsageError(
        f"Speculation of {depth!r} tokens was asked for, but auto or a number from 0 to {most} is needed "
        f"({limited_by})."
    )


class Acceptance:
    """How often the target lets a request's proposals pass, by their place, and the depth that follows from it.

    It depends on the request's own tokens alone, so that what else runs changes nothing.
    """

    def __init__(self, depth: Depth, most: int) -> None:
        """`most` proposals are what the engine takes at a time."""
        self._depth = depth
        # Running means of the checks at each place, which come about only where the places before have passed.
        self._passing = [_FIRST_GUESS] * most

    def add(self, place: int, passed: bool) -> None:
        """The proposal at `place` (from 0) was checked."""
        self._passing[place] += _NEWEST * (passed - self._passing[place])

    @property
    def hopeless(self) -> bool:
        """Whether not even trying is worth it."""
        return self._depth == "auto" and len(self._passing) > 0 and self._passing[0] < _HOPELESS

    def next_depth(self, length: int) -> int:
        """Proposals for a request that has `length` tokens: as many as come out with a chance of at least `WORTH`."""
        if self._depth != "auto":
            return self._depth
        chance, depth = 1.0, 0
        for passing in self._passing:
            chance *= passing
            if chance < WORTH:
                break
            depth += 1
        return depth or int(length % _PAUSE == 0 and len(self._passing) > 0)
