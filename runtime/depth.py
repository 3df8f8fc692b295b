"""How many tokens a draft proposes for a request: a fixed number, or as many as its own acceptance makes worth it."""

from __future__ import annotations

import math
from dataclasses import dataclass
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


@dataclass
class Acceptance:
    """The running mean of how often the target lets a request's proposals pass, and the depth that follows from it.

    It depends on the request's own tokens alone, so that what else runs changes nothing.
    """

    depth: Depth
    most: int  # proposals that the engine takes at a time
    mean: float = _FIRST_GUESS

    def add(self, passed: bool) -> None:
        """One proposal was checked."""
        self.mean += _NEWEST * (passed - self.mean)

    @property
    def hopeless(self) -> bool:
        """Whether not even trying is worth it."""
        return self.depth == "auto" and self.mean < _HOPELESS

    def next_depth(self, length: int) -> int:
        """Proposals for a request that has `length` tokens.

        The k-th proposal comes out with the probability mean^k: the depth is the largest k for which that is `WORTH`.
        """
        if self.depth != "auto":
            return self.depth
        if self.mean <= WORTH:
            return int(length % _PAUSE == 0 and self.most > 0)
        if self.mean >= 1.0:
            return self.most
        return min(self.most, int(math.log(WORTH) / math.log(self.mean)))
