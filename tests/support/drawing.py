"""What the sampler sees of a request, without the rest of one."""

from types import SimpleNamespace

import numpy as np

from angelforge.runtime.history import History


def drawing(params, prompt=(0,), output=(), rng=None, constraint=None):
    """A `Drawing` of these parameters; the generator is the seed's."""
    return SimpleNamespace(
        params=params,
        history=History(np.array(prompt, np.int64), np.array(output, np.int64)),
        rng=np.random.default_rng(params.seed) if rng is None else rng,
        constraint=constraint,
    )
