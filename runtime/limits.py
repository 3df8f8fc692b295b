"""How much runs at once: the sizes that a scheduler keeps to."""

from __future__ import annotations

from dataclasses import dataclass

from angelforge.errors import UsageError


@dataclass(frozen=True)
class Limits:
    """Sizes of the KV pool and of one step. Raises UsageError if they contradict each other."""

    page_size: int  # tokens a page
    num_pages: int  # of the pool, page 0 included
    max_context: int  # positions of one sequence
    max_batch: int  # sequences in one step
    max_tokens_per_step: int  # tokens in one step, prompts and decodes together
    max_rows: int | None = None  # rows of logits in one step, None: no limit

    def __post_init__(self) -> None:
        for name in ("page_size", "max_context", "max_batch"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}, but at least 1 is needed.")
        if self.num_pages < 2:
            raise UsageError(f"The KV cache has {self.num_pages} pages, but at least 2 are needed (page 0 is spare).")
        if self.num_pages * self.page_size >= 2**31:  # a slot is an int32
            raise UsageError(
                f"{self.num_pages} pages of {self.page_size} tokens are more than 2³¹ − 1 slots. Use fewer pages."
            )
        if self.max_tokens_per_step < self.max_batch:
            raise UsageError(
                f"max_tokens_per_step is {self.max_tokens_per_step}, but every one of max_batch = {self.max_batch} "
                "sequences must be able to decode a token in a step: raise the first or lower the second."
            )

        if self.max_rows is not None and self.max_rows < self.max_batch:
            raise UsageError(
                f"max_rows is {self.max_rows}, but every one of max_batch = {self.max_batch} sequences needs a row of "
                "logits in a step: raise the first or lower the second."
            )

    @property
    def cache_tokens(self) -> int:
        """Tokens that the cache holds."""
        return (self.num_pages - 1) * self.page_size

    def pages_for(self, tokens: int) -> int:
        """Pages that so many cached tokens of one sequence take."""
        return -(-tokens // self.page_size)
