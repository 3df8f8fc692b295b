"""What a measurement occupies on the device, before anything is allocated; what helps where it is too much."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from angelforge.config import ModelConfig
from angelforge.engines.footprint import activation_bytes, kv_bytes_per_token, partial_bytes, weight_bytes
from angelforge.errors import AngelForgeError
from angelforge.precision import Precision
from angelforge.tools.device_step.sequences import Case

PAGE_SIZE = 64
RESERVE = 1_000_000_000  # bytes: loaded kernels, the buffer that random values are made in, the allocator's rounding


@dataclass(frozen=True)
class Subject:
    """What is measured: a model's shape, and how it is filled."""

    config: ModelConfig  # of the layers that run
    precision: Precision
    max_context: int  # rows of the rope tables
    seed: int = 1
    by_operator: bool = False  # also every operator by itself: all layers' buffers are kept for that

    def needed_bytes(self, cases: Sequence[Case]) -> int:
        """Weights, a pool for the largest of the cases, the first run's buffers and those of the captured one."""
        c, dtype = self.config, self.precision.activation
        weights = sum(item.total for item in weight_bytes(c, self.precision, self.max_context))
        if c.tie_word_embeddings:  # the graph has both
            weights += c.vocab_size * c.hidden_size * dtype.itemsize
        tokens = PAGE_SIZE * max(case.pages(PAGE_SIZE) for case in cases)
        batch = max(case.batch for case in cases)
        buffers = activation_bytes(c, dtype, batch, batch) + partial_bytes(c, tokens, batch)
        runs = 1 + (c.num_hidden_layers if self.by_operator else 1)
        return weights + tokens * kv_bytes_per_token(c, dtype) + runs * buffers + RESERVE


@dataclass(frozen=True)
class Fit:
    """Which cases a device can hold, one after another over one pool."""

    cases: tuple[Case, ...]
    left_out: tuple[tuple[Case, str], ...]  # each with the reason


def fit(subject: Subject, cases: Sequence[Case], free: int) -> Fit:
    """Which of the cases fit `free` bytes, those that need least first.

    Raises:
        AngelForgeError: none does; the message says how many layers would.
    """
    order = sorted(cases, key=lambda case: subject.needed_bytes([case]))
    fitting: list[Case] = []
    for case in order:
        if subject.needed_bytes([*fitting, case]) <= free:
            fitting.append(case)
    if not fitting:
        raise AngelForgeError(f"A step of {order[0]} {_reason(subject, order[0], free)}.")
    left_out = [(case, _reason(subject, case, free)) for case in cases if case not in fitting]
    return Fit(tuple(case for case in cases if case in fitting), tuple(left_out))


def _reason(subject: Subject, case: Case, free: int) -> str:
    needed = subject.needed_bytes([case])
    for layers in range(subject.config.num_hidden_layers - 1, 0, -1):
        fewer = replace(subject, config=subject.config.with_layers(layers))
        if fewer.needed_bytes([case]) <= free:
            help_text = f"--layers {layers} fits"
            break
    else:
        help_text = "no number of layers fits"
    if subject.needed_bytes([Case(1, 1)]) <= free:
        help_text += ", or a smaller batch or context"
    return f"needs {needed / 1e9:.1f} GB of the GPU's memory, of which {free / 1e9:.1f} GB are free; {help_text}"
