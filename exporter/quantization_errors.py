"""What quantising weights lost: sums that can be joined, so that tensors, layers and whole models are told alike."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from angelforge.config_json import Section

_LARGEST_COUNT = 2**63 - 1


@dataclass(frozen=True)
class Errors:
    """Of a number of weights w, each stored as q · scale with q in e4m3. `+` joins those of two sets of weights."""

    count: int = 0  # weights
    zeros: int = 0  # of them quantised to 0
    clipped: int = 0  # beyond ±448 after scaling; none where the scale was made of the largest
    weight_squares: float = 0.0  # Σ w²
    error_squares: float = 0.0  # Σ (w - q · scale)²
    largest: float = 0.0  # max |w - q · scale| / scale; in e4m3 at most 16
    worst_tensor: str = ""  # the one with the largest relative error
    worst_relative: float = 0.0  # its relative error

    def __add__(self, other: Errors) -> Errors:
        worst = self if self.worst_relative >= other.worst_relative else other
        return Errors(
            self.count + other.count,
            self.zeros + other.zeros,
            self.clipped + other.clipped,
            self.weight_squares + other.weight_squares,
            self.error_squares + other.error_squares,
            max(self.largest, other.largest),
            worst.worst_tensor,
            worst.worst_relative,
        )

    @property
    def relative(self) -> float:
        """‖w - q · scale‖ / ‖w‖; 0 where all weights are."""
        return float((self.error_squares / self.weight_squares) ** 0.5) if self.weight_squares else 0.0

    def of_tensor(self, name: str) -> Errors:
        """The same as those of one whole tensor."""
        return dataclasses.replace(self, worst_tensor=name, worst_relative=self.relative)

    @classmethod
    def from_saved(cls, saved: Section) -> Errors:
        """The inverse of `dataclasses.asdict` after JSON. Raises AngelForgeError for anything else."""
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            if isinstance(field.default, int):
                values[field.name] = saved.integer(field.name, least=0, most=_LARGEST_COUNT)
            elif isinstance(field.default, float):
                values[field.name] = saved.number(field.name, above=-1.0)
            else:
                values[field.name] = saved.text(field.name)
        return cls(**values)
