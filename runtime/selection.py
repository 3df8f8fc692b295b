"""The largest values of a long row, without sorting the row."""

from __future__ import annotations

import numpy as np

from angelforge.runtime.batch import Float32, Int64

_GROUP = 64  # values a group; the maxima of the groups are found at memory speed


def top_ids(values: Float32, count: int) -> Int64:
    """Indices of all values not below the `count`-th largest, largest first, equal ones by index.

    Values that tie with the `count`-th are all kept, so the result may be longer. `values` [n] holds no NaN. Where n is
    much larger than 64 · count this takes two passes over the row: the `count`-th largest of the maxima of groups
    bounds the `count`-th largest value from below, since that many groups hold a value not below it.
    """
    size = values.shape[0]
    if count >= size:
        return np.argsort(-values, kind="stable")
    groups = size // _GROUP
    if groups >= 4 * count:
        # A group is a column here: the maximum of long rows is vectorised, that of short columns' values is not.
        grouped = values[: groups * _GROUP].reshape(_GROUP, groups)
        maxima = grouped.max(axis=0)
        least = _largest(maxima, count)
        columns = np.flatnonzero(maxima >= least)  # a few more than `count`: only they hold anything as large
        ids = (columns + np.arange(0, groups * _GROUP, groups)[:, None]).reshape(-1)  # rising
        ids = np.concatenate([ids, np.arange(groups * _GROUP, size)])
        found = values[ids]
        ids = ids[found >= _largest(found, count)]
    else:
        ids = np.flatnonzero(values >= _largest(values, count))
    return ids[np.argsort(-values[ids], kind="stable")]


def _largest(values: Float32, count: int) -> np.float32:
    """The `count`-th largest value."""
    place = values.shape[0] - count
    return np.partition(values, place)[place]  # type: ignore[no-any-return]
