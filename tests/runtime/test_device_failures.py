"""A device that fails at any launch ends the requests of that step with a sentence; what comes later is unharmed."""

import re
from dataclasses import replace

import pytest
import torch
from support.serving import CONTEXT, Serving, alone
from torch.utils._python_dispatch import TorchDispatchMode

from angelforge.errors import AngelForgeError
from angelforge.runtime.device import explained_gpu
from angelforge.runtime.device_sampling import DeviceSampler
from angelforge.runtime.limits import Limits
from angelforge.runtime.sampling import SamplingParams

LACK = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 139 GiB."
ASKED = [
    SamplingParams(max_tokens=4, temperature=1.0, top_k=5, seed=1, repetition_penalty=1.3, logprobs=2),
    SamplingParams(max_tokens=4, temperature=1.0, top_p=0.99, seed=2, logit_bias={3: 2.0}),
    SamplingParams(max_tokens=4, prompt_logprobs=1, frequency_penalty=0.4),
    SamplingParams(max_tokens=4, logprobs=0),
]
PLAIN = replace(ASKED[0], logprobs=None)


class Failing(TorchDispatchMode):
    """Torch whose calls are counted, of which one fails; those of the engine are left alone."""

    def __init__(self, at: int, error: type[RuntimeError] = torch.OutOfMemoryError) -> None:
        super().__init__()
        self.at, self.error, self.calls = at, error, 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is not torch.ops.aten.lift_fresh.default:  # from_numpy: of what the engine's stand-in made
            self.calls += 1
            if self.calls == self.at:
                raise self.error(LACK)
        return function(*args, **(kwargs or {}))


def served(at, depth):
    """What came of the requests while torch's call number `at` failed, and how many calls there were."""
    serving = Serving(Limits(4, 60, CONTEXT, 8, 64), depth=depth, device=True)
    if depth:
        serving.draft.logits = lambda: torch.from_numpy(serving.draft.last_logits)
    for params in ASKED:
        serving.add([2, 9, 4, 4, 17, 5], params)
    failing = Failing(at)
    with failing:
        serving.run()
    later = serving.add([3, 9, 3], PLAIN)
    serving.run()
    assert later.outbox[-1].output.token_ids == alone([3, 9, 3], PLAIN).token_ids or depth  # drafts draw otherwise
    assert later.outbox[-1].output.error is None
    assert serving.pool.free == serving.pool.capacity
    return [request.outbox[-1].output for request in serving.requests[: len(ASKED)]], failing.calls


@pytest.mark.parametrize("depth", [0, 2])
def test_whichever_call_fails(depth):
    """The first requests end with an error, all of them in the one step or by themselves; nothing is left behind."""
    untouched, calls = served(0, depth)
    assert all(output.error is None for output in untouched)
    for at in sorted({*range(1, calls, max(1, calls // 40)), calls}):
        outputs, _ = served(at, depth)
        errors = {output.error for output in outputs} - {None}
        assert errors == {
            "The GPU has no memory left for a step: CUDA out of memory. End other programs that use it, or take less "
            "for the KV cache (--kv-memory-gb)."
        }


def test_what_a_sampler_begins_with():
    with Failing(1), pytest.raises(AngelForgeError, match="no memory left"):
        DeviceSampler(torch.device("cpu"))
    with Failing(1, RuntimeError), pytest.raises(AngelForgeError, match="The GPU failed in a step: CUDA out of memory"):
        DeviceSampler(torch.device("cpu"))


def test_errors_without_a_word():
    told = re.escape("The GPU failed in a step: RuntimeError. Start")
    with pytest.raises(AngelForgeError, match=told), explained_gpu():
        raise RuntimeError
