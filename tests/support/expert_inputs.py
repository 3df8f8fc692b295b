"""Random inputs of the experts' matmuls, and how far sums in another order may be from the body's."""

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from angelforge.plugins.kernel import Kernel

BF16, FP8 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
SUM_ERROR = 3e-6  # of the sum of magnitudes: some 2⁻²⁴ for each of a few hundred additions in random order


@dataclass(frozen=True)
class Sizes:
    """A call: tokens, experts of the stack, channels [E, channels, depth] of the weights."""

    tokens: int
    experts: int
    channels: int
    depth: int


def blocks(size: int) -> int:
    """⌈size / 128⌉."""
    return -(-size // 128)


def is_fp8(kernel: Kernel) -> bool:
    """Whether it multiplies e4m3."""
    return kernel.operator.name.startswith("Fp8")


def is_gate_up(kernel: Kernel) -> bool:
    """Whether it has two weights and reads rows by token."""
    return kernel.operator.name.endswith("GateUp")


def attributes_of(kernel: Kernel, dtype: int = 16) -> dict[str, int | float]:
    """The attribute `dtype` where there is one."""
    return {"dtype": dtype} if kernel.operator.attributes else {}


def make_inputs(
    kernel: Kernel, sizes: Sizes, expert_ids: np.ndarray, expert_tokens: np.ndarray, rng: np.random.Generator
) -> list[np.ndarray]:
    """Inputs in the operator's order; FP8 values fill their range, scales spread over two orders of magnitude."""
    rows = (sizes.tokens,) if is_gate_up(kernel) else expert_ids.shape
    values: list[np.ndarray] = []

    def add(shape: tuple[int, ...], scales: tuple[int, ...], size: float) -> None:
        normal = rng.standard_normal(shape)
        if is_fp8(kernel):
            spread = size / 150 * 10 ** rng.uniform(-1.5, 0.5, scales)
            values.extend([np.clip(normal * 150, -448, 448).astype(FP8), spread.astype(np.float32)])
        else:
            values.append((normal * size).astype(BF16))

    add((*rows, sizes.depth), (*rows, blocks(sizes.depth)), 1.0)
    for _ in range(2 if is_gate_up(kernel) else 1):
        weight = (sizes.experts, sizes.channels, sizes.depth)
        add(weight, (sizes.experts, blocks(sizes.channels), blocks(sizes.depth)), sizes.depth**-0.5)
    return [*values, expert_ids, expert_tokens]


def magnitudes(kernel: Kernel, inputs: list[np.ndarray]) -> list[np.ndarray]:
    """For each weight Σ|x||w| [T, k, channels], the scale of rounding errors; 0 for entries that name no expert."""
    *values, expert_ids, _ = inputs
    wide = [_widened(*pair) for pair in zip(values[::2], values[1::2], strict=True)] if is_fp8(kernel) else values
    x, *weights = (np.abs(value.astype(np.float64)) for value in wide)
    if is_gate_up(kernel):
        x = np.repeat(x[:, None], expert_ids.shape[1], axis=1)
    found = []
    for weight in weights:
        named = (expert_ids >= 0) & (expert_ids < len(weight))
        size = np.zeros((*expert_ids.shape, weight.shape[1]))
        for token, j in np.argwhere(named):
            size[token, j] = weight[expert_ids[token, j]] @ x[token, j]
        found.append(size)
    return found


def _widened(levels: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """e4m3 times its scales, of rows or of 128×128 blocks."""
    spread = np.repeat(scale, 128, axis=-1)[..., : levels.shape[-1]]
    if scale.shape[-2] != levels.shape[-2]:
        spread = np.repeat(spread, 128, axis=-2)[..., : levels.shape[-2], :]
    return levels.astype(np.float64) * spread


def assert_close(kernel: Kernel, inputs: list[np.ndarray], found: list[np.ndarray], body: list[np.ndarray]) -> None:
    """Equal up to the order of sums and one rounding of the output."""
    sizes = magnitudes(kernel, inputs)
    # |silu(g)| ≤ |g| and |silu'| ≤ 1.1
    error = 3 * SUM_ERROR * sizes[0] * sizes[1] if is_gate_up(kernel) else SUM_ERROR * sizes[0]
    if not (is_fp8(kernel) and is_gate_up(kernel)):
        step = 2.0**-7 if found[0].dtype == BF16 else 2.0**-23
        exact = body[0].astype(np.float64)
        assert (np.abs(found[0].astype(np.float64) - exact) <= error + step * np.abs(exact)).all()
        return
    channels = error.shape[-1]
    worst = np.maximum.reduceat(error, np.arange(0, channels, 128), axis=-1)
    assert (np.abs(found[1] - body[1]) <= worst / 448 + 1e-6 * body[1]).all()
    levels, exact = found[0].astype(np.float64), body[0].astype(np.float64)
    scale, shift = (np.repeat(v, 128, axis=-1)[..., :channels] for v in (body[1].astype(np.float64), worst / body[1]))
    # A value beside a rounding boundary may fall on either side, others may not move.
    gap = np.maximum(np.abs(exact) / 8, 2.0**-9)
    moved = error / scale + 1e-5 * np.abs(exact) + shift / 448 * np.abs(exact)
    assert (np.abs(levels - exact) <= gap + moved).all()
    assert (levels != exact).mean() <= 0.01 + 4 * (moved / gap).mean()
