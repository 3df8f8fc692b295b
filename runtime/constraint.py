"""What a grammar asks of the next token."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from angelforge.runtime.batch import Bool

UInt32 = npt.NDArray[np.uint32]


class Constraint(Protocol):
    """The state of a grammar over one output; used from the thread of the stepper alone."""

    def mask(self) -> UInt32:
        """uint32 [⌈vocab / 32⌉]: bit i of word w is set where the id 32·w + i may come next; valid until `accept`."""

    def accept(self, token: int) -> None:
        """`token` came out. Not called for the token that ends the output. AngelForgeError ends the request."""


def allowed_ids(mask: UInt32, vocab_size: int) -> Bool:
    """bool [vocab]: the bits of a constraint's mask one by one; ids beyond the mask are not allowed."""
    octets = np.ascontiguousarray(mask, "<u4").view(np.uint8)
    bits = np.unpackbits(octets, count=vocab_size, bitorder="little")  # what the mask lacks is filled with 0
    return bits.view(np.bool_)
