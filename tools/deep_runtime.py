"""Steps of `doctor --deep` about engines at work: the engine that `run` uses, and sampling on the device."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
import torch

from angelforge.errors import AngelForgeError
from angelforge.runtime.batch import Batch
from angelforge.runtime.constraint import Constraint
from angelforge.runtime.device import to_host
from angelforge.runtime.device_sampling import sample_on_device
from angelforge.runtime.distribution import processed_distribution
from angelforge.runtime.history import History
from angelforge.runtime.sampling import SamplingParams
from angelforge.runtime.tensorrt_engine import TensorRTEngine

ROWS, VOCABULARY = 32, 157_184  # of AntAngelMed
_REPEATS = 50
_SEEN = 1000  # tokens of a history

Arrays = dict[str, np.ndarray[Any, Any]]


@dataclass
class Asking:
    """A request as far as the sampler looks at it."""

    params: SamplingParams
    history: History | None
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    constraint: Constraint | None = None


def runner_of(engine: TensorRTEngine) -> Callable[[Batch, Arrays, int], tuple[np.ndarray[Any, Any], Arrays]]:
    """The engine as `deep_steps.compare` calls it."""

    def run(batch: Batch, pools: Arrays, tokens: int) -> tuple[np.ndarray[Any, Any], Arrays]:
        logits = to_host(engine.forward(batch))
        return logits, {name: to_host(pool.float()) for name, pool in engine.pools.items()}

    return run


def step_microseconds(engine: TensorRTEngine, batch: Batch) -> float:
    """Microseconds from one step's logits on the host to the next's."""
    to_host(engine.forward(batch))
    begin = perf_counter()
    for _ in range(_REPEATS):
        to_host(engine.forward(batch))
    return (perf_counter() - begin) / _REPEATS * 1e6


def compare_sampling(device: str, rows: int = ROWS) -> str:
    """Draws on `device` and on the host, and how long a draw of `rows` rows takes.

    Raises AngelForgeError if a token is drawn that the host's distribution excludes, or a greedy one differs.
    """
    rng = np.random.default_rng(0)
    logits = (rng.standard_normal((rows, VOCABULARY)) * 4).astype(np.float32)
    there = torch.from_numpy(logits).to(device)
    history = rng.integers(0, VOCABULARY, _SEEN)
    greedy = [Asking(SamplingParams(), History(history)) for _ in range(rows)]
    params = SamplingParams(temperature=0.6, top_k=20, top_p=0.95, repetition_penalty=1.05)  # as its makers recommend
    sampled = [Asking(params, History(history)) for _ in range(rows)]
    if not np.array_equal(sample_on_device(there, greedy), logits.argmax(1)):
        raise AngelForgeError("greedy tokens differ from the host's")
    for row, token in enumerate(sample_on_device(there, sampled).tolist()):
        if token < 0 or processed_distribution(logits[row], params, sampled[row].history)[token] == 0:
            raise AngelForgeError(f"row {row} drew the token {token}, which the rules exclude on the host")
    plain, ruled = (_microseconds(there, requests) for requests in (greedy, sampled))
    return f"agrees with the host; {rows} rows: greedy {plain:.0f} µs, top-k, top-p and penalty {ruled:.0f} µs"


def _microseconds(logits: torch.Tensor, requests: Sequence[Asking]) -> float:
    sample_on_device(logits, requests)
    begin = perf_counter()
    for _ in range(_REPEATS):
        sample_on_device(logits, requests)
    return (perf_counter() - begin) / _REPEATS * 1e6
