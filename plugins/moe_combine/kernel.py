"""MoECombine's kernel: a program sums the experts' rows of one token over a part of the channels."""

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import triton
import triton.language as tl

from angelforge.plugins.device.launch import ceil_div
from angelforge.plugins.kernel import Gpu, Kernel, Tile
from angelforge.plugins.moe_combine.operator import MOE_COMBINE


@triton.jit
def _moe_combine(
    expert_out,
    expert_weights,
    mixed,
    per_token: tl.constexpr,
    shared: tl.constexpr,
    channels: tl.constexpr,
    n: tl.constexpr,
):
    parts: tl.constexpr = (channels + n - 1) // n
    token = (tl.program_id(0) // parts).to(tl.int64)
    channel = tl.program_id(0) % parts * n + tl.arange(0, n)
    mask = channel < channels
    source = expert_out + token * (per_token * channels) + channel
    kind = mixed.dtype.element_ty
    routed, everyone = tl.zeros((n,), tl.float32), tl.zeros((n,), tl.float32)
    for j in tl.static_range(per_token):
        weight = tl.load(expert_weights + token * per_token + j)
        value = tl.load(source + j * channels, mask, 0.0).to(tl.float32) * weight
        if j < per_token - shared:
            routed += value
        else:
            everyone += value
    # Rounded before the other part is added, as the model does.
    total = routed.to(kind).to(tl.float32) + everyone.to(kind).to(tl.float32)
    tl.store(mixed + token * channels + channel, total.to(kind), mask)


def _constants(dims: Mapping[str, Any], types: Mapping[str, ir.DataType], tile: Tile) -> dict[str, Any]:
    return {"per_token": dims["k"], "shared": dims["num_shared_experts"], "channels": dims["H"], "n": tile.n}


def _grid(dims: Mapping[str, Any], gpu: Gpu, tile: Tile) -> tuple[Any, int, int]:
    return dims["T"] * ceil_div(dims["H"], tile.n), 1, 1


KERNEL = Kernel(
    operator=MOE_COMBINE,
    function=_moe_combine,
    extras=(),
    constants=_constants,
    grid=_grid,
    tile=lambda dims, tokens: Tile(m=1, n=512 if tokens <= 64 else 1024, warps=2 if tokens <= 64 else 4, stages=1),
)
