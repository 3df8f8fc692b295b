"""What of a device's memory goes to weights, activations and steps, and how many pages are left for the KV cache."""

from __future__ import annotations

from dataclasses import dataclass

from angelforge.errors import AngelForgeError, UsageError

#: Left free: captured graphs, what sampling works with (some 20 MB), and the kernels of up to 30 execution contexts, of
#: some 35 MB each if none are shared.
RESERVE = 1_500_000_000


@dataclass(frozen=True)
class DeviceNeeds:
    """Bytes that engines need beside their pools, those of a draft included."""

    weights: int
    activations: int
    steps: int  # inputs, logits, states
    page: int  # of all pools together

    @property
    def fixed(self) -> int:
        """Without the pools."""
        return self.weights + self.activations + self.steps


@dataclass(frozen=True)
class PoolWish:
    """What is asked for the pool."""

    num_pages: int | None  # exactly so many
    kv_memory: int | None  # bytes, at most
    useful: int  # more pages would never be filled
    most: int  # the engine takes


def choose_pages(needs: DeviceNeeds, free: int, wish: PoolWish, reserve: int = RESERVE) -> int:
    """Pages of the pool, page 0 included, on a device with `free` bytes.

    Raises:
        AngelForgeError: the device is too small; what is needed and what it has.
        UsageError: the wish cannot be granted whatever the device.
    """
    if wish.num_pages is not None and not 2 <= wish.num_pages <= wish.most:
        raise UsageError(
            f"The KV cache was to have {wish.num_pages} pages, but the engine takes 2 to {wish.most} (page 0 is "
            "spare). Ask for fewer, or build it with more --pages."
        )
    left = free - needs.fixed - reserve
    if wish.num_pages is not None:
        pages, asked = wish.num_pages, f" and {wish.num_pages} pages of KV cache"
    elif wish.kv_memory is not None:
        pages, asked = wish.kv_memory // needs.page, f" and {wish.kv_memory / 1e9:.2f} GB of KV cache"
        if pages < 2:
            raise UsageError(
                f"{wish.kv_memory / 1e6:.1f} MB for the KV cache hold {pages} pages of {needs.page / 1e6:.1f} MB, but "
                "at least 2 are needed (page 0 is spare). Give it more memory."
            )
    else:
        pages, asked = max(left // needs.page, 2), " and 2 pages of KV cache"
    pages = pages if wish.num_pages is not None else min(pages, wish.useful, wish.most)
    need = needs.fixed + reserve + pages * needs.page
    if need > free:
        raise AngelForgeError(
            f"The engine needs {need / 1e9:.2f} GB of device memory ({_described(needs, reserve)}{asked}), but "
            f"{free / 1e9:.2f} GB are free. End other programs that use the GPU, ask for a smaller KV cache, or use "
            "more or larger GPUs (angelforge plan says which fit)."
        )
    return pages


def _described(needs: DeviceNeeds, reserve: int) -> str:
    return (
        f"weights {needs.weights / 1e9:.2f}, activations {needs.activations / 1e9:.2f}, steps {needs.steps / 1e9:.2f}, "
        f"reserve {reserve / 1e9:.2f} GB"
    )
