"""What speculation did: counts and times while it runs, and the report on them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SpeculationReport:
    """What speculation did for one request, or in total. A round is one target call that checked proposals."""

    target_calls: int  # that gave a token; without speculation as many as tokens
    rounds: int
    proposed: int  # tokens that the draft proposed
    accepted: int  # of them, those that came out
    accepted_length: float | None  # tokens of a round on average: 1 + accepted / rounds; None without rounds
    acceptance_by_position: tuple[float, ...]  # of the proposals for the first, second, … place, the part accepted
    draft_seconds: float  # in calls of the draft
    verify_seconds: float  # in the target's calls of the rounds


class Tally:
    """Counts rounds; a request's own, and one for all."""

    def __init__(self) -> None:
        self.target_calls = 0
        self.rounds = 0
        self.draft_seconds = 0.0
        self.verify_seconds = 0.0
        self._proposed: list[int] = []  # by place in the chain
        self._accepted: list[int] = []

    def add_round(self, proposed: int) -> None:
        """A round in which so many tokens are checked; none for a call that checks nothing."""
        self.rounds += proposed > 0
        missing = max(0, proposed - len(self._proposed))
        self._proposed += [0] * missing
        self._accepted += [0] * missing
        for place in range(proposed):
            self._proposed[place] += 1

    def add_accepted(self, place: int) -> None:
        """The token at `place` (from 0) of a round's proposals came out."""
        self._accepted[place] += 1

    def report(self) -> SpeculationReport:
        """The state of the counts."""
        accepted = sum(self._accepted)
        return SpeculationReport(
            target_calls=self.target_calls,
            rounds=self.rounds,
            proposed=sum(self._proposed),
            accepted=accepted,
            accepted_length=1 + accepted / self.rounds if self.rounds else None,
            acceptance_by_position=tuple(a / p for a, p in zip(self._accepted, self._proposed, strict=True)),
            draft_seconds=self.draft_seconds,
            verify_seconds=self.verify_seconds,
        )
