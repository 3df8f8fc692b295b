"""Choosing tokens by the kernels that `run` and `serve` use on a GPU: right beside the host's sampler, and how fast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from angelforge.runtime.device_work import Draws, SeenRows, Work
from angelforge.runtime.distribution import Float64, adjust, choices
from angelforge.runtime.history import History
from angelforge.runtime.sampling import SamplingParams

SEEN = 1000  # different tokens of a history
MARGIN = 1e-5  # of the whole weight: so far from a token's part, rounding of sums may decide for it
PENALTIES = {"repetition_penalty": 1.05, "presence_penalty": 0.3, "frequency_penalty": 0.2}
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature 1": {"temperature": 1.0},
    "top-k 50": {"temperature": 0.8, "top_k": 50},
    "top-k 20, top-p 0.95, penalties": {"temperature": 0.6, "top_k": 20, "top_p": 0.95, **PENALTIES},
    "top-p 0.95": {"temperature": 0.8, "top_p": 0.95},
    "min-p 0.05": {"temperature": 1.0, "min_p": 0.05},
    "top-p 0.95 of a flat row": {"temperature": 5.0, "top_p": 0.95},
}


@dataclass(frozen=True, eq=False)
class Step:
    """What a step asks of the kernels: logits on a device, and one rule for all rows."""

    params: SamplingParams
    logits: torch.Tensor  # f32 [n, vocab]
    draws: Draws
    seen: SeenRows
    histories: Sequence[History]

    @classmethod
    def random(cls, params: SamplingParams, rows: int, vocab: int, device: torch.device, seed: int) -> Step:
        """Logits as wide as a language model's, some hundred of them likely."""
        rng = np.random.default_rng(seed)
        logits = rng.standard_normal((rows, vocab), np.float32) * 2
        logits[:, rng.integers(0, vocab, min(vocab, 400))] += np.float32(7)
        seen = min(SEEN, vocab)
        histories = [History(rng.permutation(vocab)[:seen], rng.integers(0, vocab, 9)) for _ in range(rows)]
        sizes = [history.size for history in histories]
        entries = [np.stack((history.ids, history.counts), 1) for history in histories]
        rules = [params.temperature, params.top_k, params.top_p, params.min_p]
        penalties = [params.repetition_penalty, params.frequency_penalty, params.presence_penalty]

        def there(array: Any, kind: torch.dtype) -> torch.Tensor:
            return torch.as_tensor(np.asarray(array)).to(device, kind)

        return cls(
            params=params,
            logits=torch.from_numpy(logits).to(device),
            draws=Draws(
                rows=(every := there(np.arange(rows), torch.int64)),
                rules=there([rules] * rows, torch.float64),
                uniform=there(rng.random(rows), torch.float64),
            ),
            seen=SeenRows(
                rows=every,
                begins=there(np.cumsum([0, *sizes])[:-1], torch.int64),
                sizes=there(sizes, torch.int64),
                penalties=there([penalties] * rows, torch.float32),
                table=there(np.concatenate(entries), torch.int32),
                widest=max(sizes),
            ),
            histories=histories,
        )

    def run(self, work: Work) -> torch.Tensor:
        """The tokens int64 [n]; penalties change the logits."""
        if self.params.penalizes:
            work.penalize(self.logits, self.seen)
        return work.choose(self.logits, self.draws)


def check(work: Work, kind: str, rows: int, vocab: int, device: torch.device, seed: int) -> list[str]:
    """What differs from the host on fresh random rows, a sentence each."""
    params = SamplingParams(**KINDS[kind])
    step = Step.random(params, rows, vocab, device, seed)
    logits, uniform = step.logits.cpu().numpy().copy(), step.draws.uniform.cpu().numpy()
    found = step.run(work).tolist()
    changed = step.logits.cpu().numpy()
    problems = []
    for row, token in enumerate(found):
        adjust(logits[row], params, params.bias.ids, params.bias.values_f32, step.histories[row])
        if not np.allclose(changed[row], logits[row], rtol=1e-6, atol=1e-6):
            problems.append(f"{kind}, row {row}: penalties give other logits than the host's")
        wanted, distance = chosen(logits[row], params, uniform[row], token)
        if distance > MARGIN:
            problems.append(f"{kind}, row {row}: token {token}, but the host draws {wanted}")
    return problems


def chosen(logits: Any, params: SamplingParams, uniform: float, token: int) -> tuple[int, float]:
    """The host's token of adjusted logits f32 [vocab], and how far its mark is from another token's part; 1: no part.

    All of it is in shares of the whole weight.
    """
    ids, probabilities = choices(logits, params)
    if ids.shape[0] == 0:
        return -1, float(token != -1)
    sums: Float64 = np.cumsum(probabilities)
    mark = uniform * sums[-1]
    wanted = int(ids[np.searchsorted(sums, mark, side="right")])
    place = int(np.searchsorted(ids, token))  # ids rise
    if place == ids.shape[0] or ids[place] != token:
        return wanted, 1.0
    return wanted, max(0.0, float(sums[place] - probabilities[place] - mark), float(mark - sums[place]))


def work_of_a_step(kind: str, rows: int, vocab: int, device: torch.device, work: Work) -> Callable[[], None]:
    """The kernels' work of a step, again and again; penalties that are taken many times cost the same."""
    step = Step.random(SamplingParams(**KINDS[kind]), rows, vocab, device, 0)

    def run() -> None:
        step.run(work)

    return run
