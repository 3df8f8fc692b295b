"""Optimisation profiles: the ranges of sizes that an engine is built for, and the sizes it is tuned for.

A plugin compiled ahead of time has one tile per profile, and the best tile depends on the number of tokens: so there
is a profile for up to 8 tokens, 64 and 256 (decoding and verification of drafts), and one for prompts.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from angelforge.errors import UsageError

STEPS = (8, 64, 256)  # most tokens of the profiles before the last one


@dataclass(frozen=True)
class Range:
    """Least, tuned-for and greatest value of a size. Raises UsageError when they are not in this order."""

    least: int
    tuned: int
    most: int

    def __post_init__(self) -> None:
        if not 0 <= self.least <= self.tuned <= self.most:
            raise UsageError(f"The range {self.least} ≤ {self.tuned} ≤ {self.most} of a profile is not in order.")


@dataclass(frozen=True)
class Profile:
    """Ranges of the sizes that a step decides."""

    name: str
    tokens: Range  # T
    batch: Range  # B, sequences, padding ones included
    pages_per_sequence: Range  # P, the width of the page table
    logit_rows: Range  # R
    pages: Range  # of the pool, page 0 included

    def symbols(self) -> Mapping[str, Range]:
        """Ranges by the symbols of the graph's inputs."""
        batch = self.batch
        return {
            "T": self.tokens,
            "B": batch,
            "B+1": Range(batch.least + 1, batch.tuned + 1, batch.most + 1),
            "P": self.pages_per_sequence,
            "R": self.logit_rows,
            "pages": self.pages,
        }

    def most(self) -> dict[str, int]:
        """The greatest sizes by symbol."""
        return {symbol: sizes.most for symbol, sizes in self.symbols().items()}

    def to_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "Profile":
        """The inverse of `to_dict`."""
        return cls(name=raw["name"], **{key: Range(**value) for key, value in raw.items() if key != "name"})


@dataclass(frozen=True)
class StepLimits:
    """What an engine must serve. Raises UsageError for numbers that contradict each other."""

    max_tokens: int  # in one step
    max_batch: int  # sequences in one step
    max_context: int  # positions of one sequence
    page_size: int
    pages: int  # of the pool, page 0 included
    draft_depth: int = 0  # most draft tokens verified beside each sequence's own

    def __post_init__(self) -> None:
        for name, least in (("max_tokens", 1), ("max_batch", 1), ("max_context", 1), ("page_size", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} is {getattr(self, name)}, but at least {least} is needed.")
        if self.draft_depth < 0:
            raise UsageError(f"draft_depth is {self.draft_depth}, but at least 0 is needed.")
        if self.verified_tokens > self.max_tokens:
            raise UsageError(
                f"{self.max_batch} sequences with {self.draft_depth} draft tokens each decode {self.verified_tokens} "
                f"tokens in a step, but --max-tokens is {self.max_tokens}: raise it, or lower --max-batch."
            )
        if self.pages - 1 < self.pages_per_sequence:
            raise UsageError(
                f"The pool has {self.pages} pages of {self.page_size} tokens, but one sequence of {self.max_context} "
                f"needs {self.pages_per_sequence} and page 0 is spare: raise --pages, or export with a smaller "
                "--max-context."
            )
        if self.pages * self.page_size >= 2**31:
            raise UsageError(
                f"{self.pages} pages of {self.page_size} tokens are more than 2³¹ − 1 slots: lower --pages."
            )

    @property
    def verified_tokens(self) -> int:
        """Tokens of a step in which every sequence decodes with all its draft tokens."""
        return self.max_batch * (1 + self.draft_depth)

    @property
    def pages_per_sequence(self) -> int:
        """Pages that one sequence of `max_context` positions takes."""
        return -(-self.max_context // self.page_size)


def make_profiles(limits: StepLimits) -> tuple[Profile, ...]:
    """The profiles for `limits`, by rising number of tokens. Each starts at one token: the smallest that fits serves.

    Tuned for (reasons in docs/engines.md): one token up to 8, since a single user waits for that step; a full batch up
    to 64; a full batch with its draft up to 256; a full chunk of prompt above, and where a profile is never filled by
    decoding. Page tables and the pool have one width for all steps, their greatest.
    """
    steps = [n for n in STEPS if n < limits.max_tokens]
    most = [*steps, limits.max_tokens]
    names = [*(f"decode-{n}" for n in steps), "prefill"]
    tuned = {8: 1, 64: limits.max_batch, 256: limits.verified_tokens}
    previous = 0
    profiles = []
    for name, tokens in zip(names, most, strict=True):
        decoded = tuned.get(tokens, 0) if name != "prefill" else 0
        best = decoded if previous < decoded <= tokens else tokens
        batch = min(limits.max_batch, tokens)
        rows = min(limits.verified_tokens, tokens)
        profiles.append(
            Profile(
                name=name,
                tokens=Range(1, best, tokens),
                batch=Range(1, min(batch, best), batch),
                pages_per_sequence=Range(1, limits.pages_per_sequence, limits.pages_per_sequence),
                logit_rows=Range(1, min(rows, best if decoded else batch), rows),
                pages=Range(2, limits.pages, limits.pages),
            )
        )
        previous = tokens
    return tuple(profiles)
