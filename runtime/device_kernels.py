"""Launches of the kernels that choose tokens (`plugins/sampling/`): on a GPU, or on a CPU in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from subprocess import SubprocessError
from typing import Any

import torch

from angelforge.errors import AngelForgeError
from angelforge.plugins.sampling import kernels
from angelforge.plugins.sampling.kernels import CANDIDATES, ENTRIES_A_PROGRAM, GROUPS_A_PROGRAM, SamplingKernel
from angelforge.runtime.device import bound_to, explained_gpu
from angelforge.runtime.device_work import Draws, Measured, SeenRows

MOST_ROWS = 256  # that are worked on at once: of 157,184 ids each takes 75 kB beside its logits


class Launch:
    """A kernel: the first call compiles it, the others look nothing up."""

    def __init__(self, kernel: SamplingKernel) -> None:
        self._kernel = kernel
        self._constants = tuple(kernel.constants.values())
        self._compiled: Any = None  # stays so in the interpreter

    def __call__(self, grid: tuple[int, int, int], *arguments: Any) -> None:
        """On torch's current stream; nothing is waited for."""
        if self._compiled is None:
            kernel = self._kernel
            self._compiled = kernel.function[grid](*arguments, **kernel.constants, num_warps=kernel.warps)
        else:
            self._compiled[grid](*arguments, *self._constants)


@contextmanager
def explained_compiler() -> Iterator[None]:
    """Turns what Triton raises when it compiles or loads a kernel into an AngelForgeError."""
    try:
        yield
    except torch.OutOfMemoryError:  # no fault of the compiler
        raise
    except (RuntimeError, OSError, SubprocessError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise AngelForgeError(
            f"Triton cannot make the kernels that choose tokens: {first}. It needs a C compiler (apt install gcc) and "
            "a folder of its own that can be written to (TRITON_CACHE_DIR)."
        ) from error


class KernelWork:
    """`Work` by the kernels, for rows of one vocabulary at a time."""

    def __init__(self) -> None:
        self._vocab = 0
        self._launches: dict[tuple[str, int], Launch] = {}
        self._room: _Room | None = None

    def prepare(self, vocab: int, device: torch.device) -> None:
        """Launches every kernel once, so that no request waits for Triton: some ten seconds, later ones from its cache.

        Raises AngelForgeError where Triton cannot compile or load one, or memory is short.
        """
        with bound_to(device), explained_gpu(), explained_compiler():
            logits = torch.zeros((1, vocab), device=device)
            row, number = (torch.zeros(1, dtype=kind, device=device) for kind in (torch.int64, torch.int32))
            rules, uniform = (torch.zeros(shape, dtype=torch.float64, device=device) for shape in ((1, 4), 1))
            masks = torch.zeros((1, kernels.group_count(vocab)), dtype=torch.int32, device=device)
            self.choose(logits, Draws(row, rules, uniform))
            self.choose(logits, Draws(row, rules, uniform, number, masks))
            self.measure(logits, row, row, 1)
            penalties = torch.zeros((1, 3), device=device)
            table = torch.zeros((1, 2), dtype=torch.int32, device=device)
            counts = torch.zeros((1, 1), device=device)
            seen = SeenRows(row, row, row, penalties, table, 0)
            self.penalize(logits, seen)
            self.penalize(logits, seen._replace(ahead_ids=number.view(1, 1), ahead_counts=counts))

    def choose(self, logits: torch.Tensor, draws: Draws) -> torch.Tensor:
        """Two launches for 256 rows."""
        size = draws.rows.shape[0]
        chosen = torch.empty(size, dtype=torch.int64, device=logits.device)
        wide = 0 if draws.words is None else draws.words.shape[1]
        for begin in range(0, size, MOST_ROWS):
            part = slice(begin, begin + MOST_ROWS)
            rows, rules = draws.rows[part], draws.rules[part]
            masks = None if draws.mask_of is None else draws.mask_of[part]
            room = self._group(logits, rows, rules, masks, draws.words)
            self._launch("choose", wide, lambda: kernels.choose(self._vocab, wide))(
                (rows.shape[0], 1, 1),
                logits, rows, rules, draws.uniform[part], masks, draws.words, *room.tensors, chosen[part],
            )  # fmt: skip
        return chosen

    def penalize(self, logits: torch.Tensor, seen: SeenRows) -> None:
        """One launch."""
        self._know(logits)
        ahead = 0 if seen.ahead_ids is None else seen.ahead_ids.shape[1]
        columns = kernels.columns_for(ahead)
        self._launch("penalize", columns, lambda: kernels.penalize(self._vocab, columns))(
            (seen.rows.shape[0], max(1, -(-seen.widest // ENTRIES_A_PROGRAM)), 1),
            logits, seen.rows, seen.begins, seen.sizes, seen.penalties, seen.ahead_ids, seen.ahead_counts, seen.table,
            ahead,
        )  # fmt: skip

    def measure(self, logits: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor, count: int) -> Measured:
        """Two launches for 256 rows."""
        size, device, count = rows.shape[0], logits.device, min(count, logits.shape[1])
        peak, logit = (torch.empty(size, dtype=torch.float32, device=device) for _ in range(2))
        total = torch.empty(size, dtype=torch.float64, device=device)
        values = torch.empty((size, count), dtype=torch.float32, device=device)
        ids = torch.empty((size, count), dtype=torch.int32, device=device)
        for begin in range(0, size, MOST_ROWS):
            part = slice(begin, begin + MOST_ROWS)
            some = rows[part]
            room = self._group(logits, some, None, None, None)
            self._launch("measure", 0, lambda: kernels.measure(self._vocab))(
                (some.shape[0], 1, 1),
                logits, some, tokens[part], *room.tensors, count,
                peak[part], total[part], logit[part], values[part], ids[part],
            )  # fmt: skip
        return Measured(peak, total, logit, values, ids)

    def _group(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor,
        rules: torch.Tensor | None,
        mask_of: torch.Tensor | None,
        words: torch.Tensor | None,
    ) -> _Room:
        """What the other kernels have to know of each group of a row; without rules, as the logits are."""
        self._know(logits)
        size, wide, tempered = rows.shape[0], 0 if words is None else words.shape[1], rules is not None
        if self._room is None or self._room.rows < size:
            self._room = _Room(size, self._vocab, logits.device)
        name = "group by rules" if tempered else "group"
        self._launch(name, wide, lambda: kernels.group_rows(self._vocab, wide, tempered))(
            (size, self._room.programs, 1), logits, rows, rules, mask_of, words, *self._room.tensors[:2]
        )
        return self._room

    def _know(self, logits: torch.Tensor) -> None:
        if logits.shape[1] != self._vocab:
            self._vocab, self._room, self._launches = logits.shape[1], None, {}

    def _launch(self, name: str, variant: int, kernel: Callable[[], SamplingKernel]) -> Launch:
        launch = self._launches.get((name, variant))
        if launch is None:
            launch = self._launches[name, variant] = Launch(kernel())
        return launch


class _Room:
    """What kernels hand to one another for so many rows of a vocabulary."""

    def __init__(self, rows: int, vocab: int, device: torch.device) -> None:
        groups = kernels.group_count(vocab)
        self.rows, self.programs = rows, -(-groups // GROUPS_A_PROGRAM)
        kinds = (
            (groups, torch.int32),  # keys
            (groups, torch.float32),  # sums
            (groups, torch.int32),  # groups listed
            (CANDIDATES, torch.float32),  # values
            (CANDIDATES, torch.int32),  # ids
        )
        self.tensors = tuple(torch.empty((rows, width), dtype=kind, device=device) for width, kind in kinds)
