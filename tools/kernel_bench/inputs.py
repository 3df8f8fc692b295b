"""Fresh random inputs of a call, on any device. Integers are what a scheduler would hand over."""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from angelforge.plugins.operator import Port
from angelforge.plugins.run_kernel import TORCH_TYPES
from angelforge.tools.kernel_bench.costs import port_shape, port_types
from angelforge.tools.kernel_bench.work import PAGE_SIZE, Work

Ints = NDArray[np.int32] | NDArray[np.int64]


def make_inputs(
    work: Work, seed: int, device: str = "cuda", reuse: Mapping[str, torch.Tensor] | None = None
) -> list[torch.Tensor]:
    """Inputs in the operator's order. Values are normal, weights scaled so that sums stay near 1.

    Those in `reuse` are taken from there.
    """
    integers = _integers(work, np.random.default_rng(seed))
    generator = torch.Generator(device).manual_seed(seed)
    found = []
    for port, dtype in zip(work.operator.inputs, port_types(work), strict=True):
        if reuse is not None and port.name in reuse:
            found.append(reuse[port.name])
        elif port.name in integers:
            found.append(torch.from_numpy(integers[port.name]).to(device))
        else:
            shape = port_shape(work, port)
            found.append(_values(port, shape, TORCH_TYPES[dtype], generator, device))
    return found


def experts_used(work: Work, inputs: list[torch.Tensor]) -> int:
    """Different experts that a call's tokens take; 0 for operators without experts."""
    for port, tensor in zip(work.operator.inputs, inputs, strict=True):
        if port.name == "expert_ids":
            return int(tensor.unique().numel())
    return 0


def _values(
    port: Port, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, device: str
) -> torch.Tensor:
    if port.name.endswith("_scale"):  # with e4m3 values of about ±100: the product is near 1
        value = torch.rand(shape, generator=generator, device=device)
        return (value.mul_(0.9).add_(0.1) * (0.01 if port.name in ("x_scale", "inner_scale") else 0.0002)).to(dtype)
    result = torch.empty(shape, dtype=dtype, device=device)
    small = port.name in ("weight", "gate", "up", "down") and len(shape) > 1 and dtype != torch.float8_e4m3fn
    size = 0.02 if small else 100.0 if dtype == torch.float8_e4m3fn else 1.0
    # In pieces of the first axis: a stack of experts in f32 beside it would fill the GPU.
    rows = max(1, (1 << 26) // max(1, result[:1].numel()))
    for start in range(0, shape[0], rows):
        part = torch.randn(result[start : start + rows].shape, generator=generator, device=device).mul_(size)
        result[start : start + rows] = part.clamp_(-448, 448).to(dtype)
    return result


def _integers(work: Work, rng: np.random.Generator) -> dict[str, Ints]:
    dims = work.dims
    names = {port.name for port in work.operator.inputs}
    found: dict[str, Ints] = {}
    if "num_tokens" in names:
        found["num_tokens"] = np.array([dims["T"]], np.int32)
    if "input_ids" in names:
        found["input_ids"] = rng.integers(0, dims["V"], dims["T"])
    if "expert_ids" in names:
        ids = choose_experts(rng, dims["T"], dims["E"], dims["k"], work.shared)
        found |= {"expert_ids": ids, "expert_tokens": bits_of(ids, dims["E"])}
    if "slots" in names:
        order = rng.permutation((dims["pages"] - 1) * PAGE_SIZE)[: dims["T"]] + PAGE_SIZE
        found["slots"] = order.astype(np.int32)
        found["positions"] = rng.integers(0, dims["P"], dims["T"]).astype(np.int32)
    if work.sequences is not None:
        found |= _sequence_integers(work, rng)
    return found


def _sequence_integers(work: Work, rng: np.random.Generator) -> dict[str, Ints]:
    assert work.sequences is not None
    items, lengths = work.sequences.items, work.sequences.lengths
    found: dict[str, Ints] = {
        "query_start": np.cumsum([0, *(tokens for _, tokens in items)]).astype(np.int32),
        "kv_length": np.array(lengths, np.int32),
        "positions": np.concatenate([np.arange(history, history + tokens) for history, tokens in items]).astype(
            np.int32
        ),
    }
    if "pages" in work.dims:
        order = rng.permutation(np.arange(1, work.dims["pages"], dtype=np.int32))
        table = np.zeros((work.dims["B"], work.dims["P"]), np.int32)
        for row, length in zip(table, lengths, strict=True):
            count = -(-length // PAGE_SIZE)
            row[:count], order = order[:count], order[count:]
        found["page_table"] = table
    else:
        split, most = int(work.attributes["split_length"]), _split_queries()
        starts, taken = [], 0
        for (_, tokens), length in zip(items, lengths, strict=True):
            starts.append(taken if tokens <= most else -1)
            taken += tokens * -(-length // split) if tokens <= most else 0
        found["partial_start"] = np.array(starts, np.int32)
    return found


def _split_queries() -> int:
    from angelforge.plugins.paged_attention.operator import SPLIT_QUERIES

    return SPLIT_QUERIES


def choose_experts(
    rng: np.random.Generator, tokens: int, experts: int, per_token: int, shared: int
) -> NDArray[np.int32]:
    """int32 [tokens, per_token]: different random experts for each token, the last `shared` of the stack by all."""
    routed = experts - shared
    ids = np.argpartition(rng.random((tokens, routed)), per_token - shared - 1, axis=1)[:, : per_token - shared]
    everyone = np.broadcast_to(np.arange(routed, experts), (tokens, shared))
    return np.ascontiguousarray(np.concatenate([ids, everyone], axis=1).astype(np.int32))


def bits_of(ids: NDArray[np.int32], experts: int) -> NDArray[np.int32]:
    """int32 [experts, words]: bit t % 32 of word [e, t // 32] says that token t goes to expert e (MoERoute)."""
    bits = np.zeros((experts, -(-len(ids) // 128) * 128), bool)
    token, slot = np.nonzero(ids >= 0)
    bits[ids[token, slot], token] = True
    return np.packbits(bits, axis=1, bitorder="little").view(np.int32)
