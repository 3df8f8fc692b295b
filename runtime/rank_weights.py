"""A rank's part of a stored weight, in host memory: a view of the file where its bytes lie together, else a copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from angelforge.diskerrors import explained
from angelforge.runtime.weight_layout import Slice
from angelforge.tensorfile import TensorInfo


def read_slice(info: TensorInfo, cut: Sequence[Slice]) -> npt.NDArray[Any]:
    """The slices of a tensor behind one another, in its own type; read only.

    One slice of the first axis is mapped, not read. Raises AngelForgeError when the file cannot be read.
    """
    with explained("read", info.path):
        raw = np.memmap(info.path, np.uint8, "r", info.offset, (info.nbytes,))
    whole = raw.view(info.dtype.numpy).reshape(info.shape)
    parts = [whole[(slice(None),) * one.axis + (slice(one.start, one.stop),)] for one in cut]
    if len(parts) == 1:
        return np.ascontiguousarray(parts[0])  # which copies only what does not lie together
    return np.concatenate(parts, axis=cut[0].axis)
