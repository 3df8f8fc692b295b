"""What ranks tell each other in a step, and how long that takes at least: all-reduces over the target's links."""

from __future__ import annotations

from dataclasses import dataclass

from angelforge.config import ModelConfig
from angelforge.dtypes import DType

# Of one small message over NVLink, start to end, as measured by others (PLATFORM: two all-reduces a layer of ~10 µs).
LATENCY = 10e-6  # s


@dataclass(frozen=True)
class Communication:
    """All-reduces of one step."""

    calls: int
    nbytes: int  # that each rank sends
    seconds: float


NOTHING = Communication(0, 0, 0.0)


def communication(
    config: ModelConfig, activation: DType, tokens: int, rows: int, ranks: int, link_bandwidth: float | None
) -> Communication:
    """What a step of `tokens` tokens with `rows` rows of logits costs each of `ranks` ranks.

    The graph sums what the embedding, every attention block and every MLP makes [T, H] in the activations' type, and
    the logits [R, vocab] in f32. Of a message of n bytes a rank sends 2 (N - 1) / N n bytes (ring: Patarasuk and Yuan
    2009). `link_bandwidth` in bytes/s in one direction; without one only the latency counts.
    """
    if ranks == 1:
        return NOTHING
    calls = 2 * config.num_hidden_layers + 2
    summed = (calls - 1) * tokens * config.hidden_size * activation.itemsize
    summed += rows * config.vocab_size * DType.F32.itemsize
    sent = round(2 * (ranks - 1) / ranks * summed)
    return Communication(calls, sent, calls * LATENCY + (sent / link_bandwidth if link_bandwidth else 0.0))
