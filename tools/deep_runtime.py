"""Steps of `doctor --deep` about engines at work: the engine that `run` uses, and sampling on the device."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np
import torch

from angelforge.errors import AngelForgeError
from angelforge.runtime.batch import Batch, Int64
from angelforge.runtime.constraint import Constraint
from angelforge.runtime.device import to_host
from angelforge.runtime.device_adjusting import Place
from angelforge.runtime.device_sampling import DeviceSampler
from angelforge.runtime.history import History
from angelforge.runtime.sampler import sample as sample_on_host
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
    """Draws on `device` and on the host, how long a draw of `rows` rows takes, and how often the host waits in it.

    Raises AngelForgeError if a token is not the host's, or if the host waits more than once.
    """
    rng = np.random.default_rng(0)
    logits = (rng.standard_normal((rows, VOCABULARY)) * 4).astype(np.float32)
    there = torch.tensor(logits, device=device)  # a copy: penalties are taken in place
    history = rng.integers(0, VOCABULARY, _SEEN)
    params = SamplingParams(temperature=0.6, top_k=20, top_p=0.95, repetition_penalty=1.05)  # as its makers recommend
    kinds = {"greedy": SamplingParams(), "all rules": params, "logprobs": replace(params, logprobs=5)}
    asked = {name: [Asking(each, History(history)) for _ in range(rows)] for name, each in kinds.items()}
    sampler = DeviceSampler(torch.device(device))
    for name in ("greedy", "all rules"):
        wanted = sample_on_host(logits, [Asking(kinds[name], History(history)) for _ in range(rows)])
        for row, (token, other) in enumerate(zip(sample(sampler, there, asked[name]), wanted, strict=True)):
            if token != other:
                raise AngelForgeError(f"{name}: row {row} gave the token {token}, on the host it gives {other}")
    plain, ruled = (_microseconds(sampler, there, asked[name]) for name in ("greedy", "all rules"))
    text = f"agrees with the host; {rows} rows: greedy {plain:.0f} µs, top-k, top-p and penalty {ruled:.0f} µs"
    if there.device.type != "cuda":
        return text
    for name, requests in asked.items():
        sample(sampler, there, requests)
        if (waits := synchronisations(partial(sample, sampler, there, requests))) != 1:
            raise AngelForgeError(f"{text}; but the host waits {waits} times in a step ({name}), once was expected")
    return f"{text}; the host waits once"


def sample(sampler: DeviceSampler, logits: torch.Tensor, requests: Sequence[Asking]) -> Int64:
    """A token for each row."""
    return sampler.answer(logits, [Place.of(row, request) for row, request in enumerate(requests)]).tokens


def synchronisations(work: Callable[[], object]) -> int:
    """How often `work` makes the host wait for the GPU, as torch tells it."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in told)


def _microseconds(sampler: DeviceSampler, logits: torch.Tensor, requests: Sequence[Asking]) -> float:
    sample(sampler, logits, requests)
    begin = perf_counter()
    for _ in range(_REPEATS):
        sample(sampler, logits, requests)
    return (perf_counter() - begin) / _REPEATS * 1e6
