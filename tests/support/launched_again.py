"""A program: does a launch that looks nothing up hand over what Triton's own launch of the same work does?

Prints how many launches were compared. No GPU is asked; kernels are compiled for sm_90.
"""

from typing import Any

import torch

from angelforge.runtime.device_kernels import KernelWork
from angelforge.runtime.sampling import SamplingParams
from angelforge.tools.no_triton import Launcher, launch_nothing
from angelforge.tools.sampling_bench import Step

PENALIZED = SamplingParams(temperature=1.0, repetition_penalty=1.1)


def record(work: KernelWork) -> list[tuple[Any, ...]]:
    """The arguments of all that is launched for a step of every kind."""
    found: list[tuple[Any, ...]] = []

    def note(self: Launcher, *arguments: Any) -> None:
        found.append(arguments)

    before, Launcher.__call__ = Launcher.__call__, note  # type: ignore[method-assign]
    step = Step.random(PENALIZED, 3, 100, torch.device("cpu"), 0)
    step.run(work)
    masks = torch.zeros(3, dtype=torch.int32), torch.zeros((1, 4), dtype=torch.int32)
    work.choose(step.logits, step.draws._replace(mask_of=masks[0], words=masks[1]))
    work.measure(step.logits, step.draws.rows, step.draws.rows, 2)
    ahead = torch.zeros((3, 2), dtype=torch.int32), torch.zeros((3, 2))
    work.penalize(step.logits, step.seen._replace(ahead_ids=ahead[0], ahead_counts=ahead[1]))
    Launcher.__call__ = before  # type: ignore[method-assign]
    return found


def alike(one: Any, other: Any) -> bool:
    """Tensors of the same shape and type, the same numbers; what Triton tells its hooks is made anew each time."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return (one.shape, one.dtype) == (other.shape, other.dtype)
    return type(one) is type(other) and (type(one).__name__ == "LazyDict" or one == other)


if __name__ == "__main__":
    launch_nothing()
    work = KernelWork()
    first, again = record(work), record(work)
    assert len(first) == len(again)
    for one, other in zip(first, again, strict=True):
        assert len(one) == len(other)
        assert all(map(alike, one, other))
    print(len(first))
