"""What the demo asks the toy, and what is measured of its answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np

from angelforge.errors import AngelForgeError
from angelforge.runtime.depth import Depth
from angelforge.runtime.llm import LLM
from angelforge.runtime.sampling import SamplingParams
from angelforge.runtime.tally import SpeculationReport
from angelforge.runtime.validate.reference import load_reference

CALLS: tuple[tuple[str, ...], ...] = (  # what is said in turn; the last one is to be answered
    ("Hello, I have a cough. I have had it for 4 days. I am 34 years old.",),
    (
        "I am 61 years old and my chest hurts, for 2 days now.",
        "I am sorry to hear that. You are 61 years old and have had chest pain for 2 days. Please tell me one thing: "
        "do you notice that the pain spreads to your arm or jaw?",
        "Yes, it spreads to my left arm.",
    ),
    ("For 3 days I feel dizzy. I am 45 years old. I speak as usual.",),
    ("I twisted my ankle. It began one day ago. I am 19. I can walk.",),
    ("What is triage?",),
)


@dataclass(frozen=True)
class Answers:
    """What the toy said, one call after another, and what that took."""

    texts: tuple[tuple[str, str], ...]  # the last thing asked, the answer
    tokens: tuple[tuple[int, ...], ...]
    prompts: tuple[tuple[int, ...], ...]
    target_calls: int
    seconds: float  # without loading
    report: SpeculationReport | None

    @property
    def count(self) -> int:
        """Tokens of all answers."""
        return sum(map(len, self.tokens))

    @property
    def calls_per_100(self) -> float:
        """Target calls that gave 100 tokens."""
        return 100 * self.target_calls / self.count

    def describe(self) -> str:
        """One line: tokens, calls, speed."""
        return f"{self.count} tokens in {self.target_calls} target calls, {self.count / self.seconds:.0f} tokens/s"


def answer(bundle: Path, speculate: Depth) -> Answers:
    """Lets the toy answer all calls, one at a time, greedily. Raises AngelForgeError if it cannot."""
    with LLM(bundle, speculate=speculate) as llm:
        prompts = [llm.chat_prompt(_messages(call)) for call in CALLS]
        outputs, begin = [], perf_counter()
        for prompt in prompts:
            outputs += llm.generate([prompt], SamplingParams(max_tokens=120))
        seconds = perf_counter() - begin
        report = llm.speculation
    for output in outputs:
        if output.error is not None:
            raise AngelForgeError(output.error)
    calls = [len(o.token_ids) if o.speculation is None else o.speculation.target_calls for o in outputs]
    return Answers(
        texts=tuple((call[-1], output.text) for call, output in zip(CALLS, outputs, strict=True)),
        tokens=tuple(output.token_ids for output in outputs),
        prompts=tuple(map(tuple, prompts)),
        target_calls=sum(calls),
        seconds=seconds,
        report=report,
    )


def compare(bundle: Path, checkpoint: Path, answers: Answers) -> tuple[float, str]:
    """(largest error of the logits of the first answer, relative to the largest logit; the same in words)."""
    ids = [*answers.prompts[0], *answers.tokens[0]]
    with LLM(bundle, speculate=0) as llm:
        found = llm.score(ids)
    expected = load_reference(checkpoint).logits(ids)
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    same = int((found.argmax(-1) == expected.argmax(-1)).sum())
    return error, f"{len(ids)} positions: largest error {error:.1e}, same best token at {same}"


def _messages(call: tuple[str, ...]) -> list[dict[str, str]]:
    return [{"role": "assistant" if turn % 2 else "user", "content": text} for turn, text in enumerate(call)]
