"""A closed loop around an LLM in this process: as soon as a request ends the next one begins."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from time import perf_counter

from angelforge.errors import AngelForgeError
from angelforge.runtime.call import merged
from angelforge.runtime.llm import LLM
from angelforge.runtime.prompts import Prompt
from angelforge.runtime.request import Delta
from angelforge.runtime.sampling import SamplingParams
from angelforge.tools.load.figures import Sample
from angelforge.tools.load.prompts import Ask


def run_in_process(
    llm: LLM, asks: Sequence[Ask], concurrency: int, temperature: float, tell: Callable[[int, int], None]
) -> tuple[list[Sample], float]:
    """(a sample of each request, seconds in all) with `concurrency` requests in flight.

    `tell` gets how many have ended, and all. Raises AngelForgeError if a request fails.
    """
    prompts = [_prompt(llm, ask) for ask in asks]  # tokenized first: this is about the engine
    samples = [Sample() for _ in asks]
    last = [0.0] * len(asks)
    waiting, outbox = deque(range(len(asks))), deque[Delta]()
    ended = running = 0
    begin = perf_counter()
    while ended < len(asks):
        while waiting and running < concurrency:
            index = waiting.popleft()
            ask = asks[index]
            params = SamplingParams(ask.max_tokens, temperature, seed=index, ignore_eos=ask.ignore_eos)
            last[index] = perf_counter()
            llm.stepper.add(llm.make_request(prompts[index], params, outbox, index=index))
            running += 1
        llm.stepper.step()
        now = perf_counter()
        new = merged(outbox)
        outbox.clear()
        for delta in new:
            _note(samples[delta.index], delta, now - last[delta.index])
            last[delta.index] = now
            if delta.output is not None:
                running -= 1
                ended += 1
                tell(ended, len(asks))
    return samples, perf_counter() - begin


def _prompt(llm: LLM, ask: Ask) -> Prompt:
    if ask.messages:
        return llm.chat_prompt(ask.messages)
    return ask.text if ask.text is not None else list(ask.ids)


def _note(sample: Sample, delta: Delta, seconds: float) -> None:
    count = len(delta.token_ids)
    if count and not sample.tokens:
        sample.first = seconds
    elif count:
        sample.gaps += [seconds / count] * count  # what a draft gave at once shares the time
    sample.tokens += count
    if delta.output is not None:
        if delta.output.error is not None:
            raise AngelForgeError(f"Request {delta.index} has failed: {delta.output.error}")
        sample.prompt_tokens = len(delta.output.prompt_token_ids)
        sample.cached_tokens = delta.output.cached_tokens
