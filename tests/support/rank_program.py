"""What each rank of a test runs: `generate` writes what rank 0 computed; `hold` generates until something fails."""

import sys
import time
from pathlib import Path

import numpy as np

from angelforge import LLM, SamplingParams

IDS = [7, 400, 21, 3, 1000, 512, 511, 255, 256, 600] * 7  # longer than a page, from every rank's part of the vocabulary
PROMPTS = [[5, 6, 7], list(range(300, 380)), [1000, 3]]
PARAMS = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)


def compute(llm: LLM) -> dict[str, np.ndarray]:
    """Logits of one sequence, and greedy tokens of a batch, with the draft where there is one."""
    outputs = llm.generate(PROMPTS, PARAMS)
    assert [output.error for output in outputs] == [None] * len(PROMPTS)
    accepted = 0 if llm.speculation is None else llm.speculation.proposed
    return {
        "logits": llm.score(IDS),
        "tokens": np.array([output.token_ids for output in outputs]),
        "proposed": np.array(accepted),
    }


def main(ranks: int, task: str, bundle: Path, result: Path) -> None:
    """Runs one task."""
    with LLM(bundle, tensor_parallel=ranks, kv_memory=40_000_000, threads=1) as llm:
        if task == "generate":
            np.savez(result, **compute(llm))
            return
        result.write_text("ready")
        while (output := llm.generate([[5, 6, 7]], SamplingParams(max_tokens=400, ignore_eos=True))[0]).error is None:
            pass
        print(output.finish_reason, output.error, time.time())


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
