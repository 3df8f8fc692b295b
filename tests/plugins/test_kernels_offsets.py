"""Tensors of more than 2³¹ elements: kernels write and read behind them. Only pages that are touched take memory."""

import mmap
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from support.attention import attend
from support.interpreter import exact_interpreter, one_program, run_interpreted, to_numpy, to_torch
from support.routing import expert_tokens

from angelforge.plugins.attention_merge.kernel import KERNEL as MERGE
from angelforge.plugins.attention_merge_quantize.kernel import KERNEL as MERGE_QUANTIZE
from angelforge.plugins.device import expert_launch
from angelforge.plugins.fp8_moe_down.kernel import KERNEL as FP8_DOWN
from angelforge.plugins.fp8_moe_gate_up.kernel import KERNEL as FP8_GATE_UP
from angelforge.plugins.kernel import Gpu, Kernel, Tile
from angelforge.plugins.moe_down.kernel import KERNEL as DOWN
from angelforge.plugins.moe_gate_up.kernel import KERNEL as GATE_UP
from angelforge.plugins.paged_attention.kernel import KERNEL as ATTENTION
from angelforge.plugins.qkv_prepare.kernel import KERNEL as QKV_PREPARE
from angelforge.plugins.qkv_rotate.kernel import KERNEL as QKV_ROTATE
from angelforge.plugins.run_kernel import bind_tensors, launch

LIMIT = 2**31
ONE_SM = Gpu("sm_90", 1)
PAGE, DIM = 64, 128  # a page of one head has 2 · 64 · 128 elements
SIZE = 512  # channels and depth of an expert
NO_RESERVE = 0x4000  # MAP_NORESERVE of Linux; mmap names it from Python 3.11 on


def sparse(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """A tensor of zeros that takes no memory until it is touched, nor is any set aside for it."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
    memory = mmap.mmap(-1, int(np.prod(shape)) * dtype.itemsize, flags=flags)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


@pytest.mark.parametrize("page_size", [64, 24, 16])  # a tile of keys in a page, across pages, over several
def test_the_last_pages_of_a_large_pool_are_written_and_read(page_size: int) -> None:
    """Keys and values of two tokens go where their slots say, and attention finds them there."""
    pages = LIMIT // (2 * page_size * DIM) + 4
    pool = sparse(torch.bfloat16, pages, 2, 1, page_size, DIM)
    rng = np.random.default_rng(0)
    qkv = to_torch(rng.standard_normal((2, 3 * DIM)).astype(ml_dtypes.bfloat16))
    slots = torch.tensor([pages * page_size - 1, (pages - 2) * page_size], dtype=torch.int32)
    tables = [torch.ones(16, 32), torch.zeros(16, 32), torch.zeros(2, dtype=torch.int32)]  # no rotation
    step = [*tables, slots, torch.tensor([2], dtype=torch.int32), pool]
    attributes = {"num_heads": 1, "num_kv_heads": 1, "rotary_dim": 64}
    run_interpreted(QKV_ROTATE, [qkv, *step], attributes, profile_tokens=8)
    for row, (page, offset) in enumerate([(pages - 1, page_size - 1), (pages - 2, 0)]):
        assert torch.equal(pool[page, 0, 0, offset], qkv[row, DIM : 2 * DIM])
        assert torch.equal(pool[page, 1, 0, offset], qkv[row, 2 * DIM :])
    assert not pool[0].any()

    pool[pages - 2 :] = to_torch(rng.standard_normal((2, 2, 1, page_size, DIM)).astype(ml_dtypes.bfloat16))
    query = to_torch(rng.standard_normal((1, 1, DIM)).astype(ml_dtypes.bfloat16))
    length = 2 * page_size
    numbers = [[[pages - 2, pages - 1]], [0, 1], [length], [length - 1]]  # table, starts, lengths, positions
    inputs = [query, pool, *(torch.tensor(values, dtype=torch.int32) for values in numbers)]
    attributes = {"scale": DIM**-0.5, "split_length": 256, "split_queries": 1}
    _, partial, _, start = run_interpreted(ATTENTION, inputs, attributes, gpu=ONE_SM, profile_tokens=8)
    keys, values = to_numpy(pool[pages - 2 :]).astype(np.float32).transpose(1, 2, 0, 3, 4).reshape(2, 1, -1, DIM)
    expected = attend(to_numpy(query).astype(np.float32), keys, values, np.ones((1, length), bool), DIM**-0.5)
    np.testing.assert_allclose(to_numpy(partial[int(start[0])]), expected[0], atol=0.01)


def test_prepared_keys_are_written_behind_two_to_the_31() -> None:
    """As above with norms of queries and keys: values arrive as they are, keys with a norm of 1 by element."""
    pages = LIMIT // (2 * PAGE * DIM) + 4
    pool = sparse(torch.bfloat16, pages, 2, 1, PAGE, DIM)
    qkv = to_torch(np.random.default_rng(0).standard_normal((1, 3 * DIM)).astype(ml_dtypes.bfloat16))
    inputs: dict[str, torch.Tensor] = {
        "qkv": qkv,
        "q_norm": torch.ones(DIM, dtype=torch.bfloat16),
        "k_norm": torch.ones(DIM, dtype=torch.bfloat16),
        "rope_cos": torch.ones(16, 32),
        "rope_sin": torch.zeros(16, 32),
        "positions": torch.zeros(1, dtype=torch.int32),
        "slots": torch.tensor([pages * PAGE - 1], dtype=torch.int32),
        "num_tokens": torch.tensor([1], dtype=torch.int32),
        "kv_cache": pool,
    }
    attributes = {"num_heads": 1, "num_kv_heads": 1, "rotary_dim": 64, "epsilon": 1e-6}
    ordered = [inputs[port.name] for port in QKV_PREPARE.operator.inputs]
    run_interpreted(QKV_PREPARE, ordered, attributes, profile_tokens=8)
    key, value = pool[pages - 1, :, 0, PAGE - 1].float()
    assert torch.equal(value, qkv[0, 2 * DIM :].float())
    torch.testing.assert_close(key.square().mean(), torch.tensor(1.0), rtol=0.01, atol=0)


def test_parts_are_written_behind_two_to_the_31() -> None:
    """A long sequence takes the rows of `partial` up to there; one of many programs computes the next one's piece."""
    heads, split, queries, pages = 32, 32, 8, 2**15 + 2
    rows = LIMIT // (heads * DIM)  # 8 tokens of the first sequence, over 2²¹ keys
    keys = rows // queries * split
    pool = sparse(torch.bfloat16, pages, 2, 1, PAGE, DIM)
    rng = np.random.default_rng(0)
    pool[1] = to_torch(rng.standard_normal((2, 1, PAGE, DIM)).astype(ml_dtypes.bfloat16))
    query = to_torch(rng.standard_normal((queries + 1, heads, DIM)).astype(ml_dtypes.bfloat16))
    table = torch.ones(2, keys // PAGE, dtype=torch.int32)
    numbers = [[0, queries, queries + 1], [keys, split], [*range(keys - queries, keys), split - 1]]
    inputs = [query, pool, table, *(torch.tensor(values, dtype=torch.int32) for values in numbers)]
    attributes = {"scale": DIM**-0.5, "split_length": split, "split_queries": queries}
    binding = bind_tensors(ATTENTION, inputs, attributes)
    partial, lse = (sparse(torch.float32, *shape) for shape in binding.output_shapes[1:3])
    outputs = [torch.zeros_like(query), partial, lse, torch.zeros(2, dtype=torch.int32)]
    pieces = queries * heads // 32 * (rows // queries) + 1
    with one_program(pieces - 1, pieces), exact_interpreter(inputs, outputs):
        launch(ATTENTION, inputs, outputs, binding, ONE_SM, Tile(m=16, n=32, k=32, stages=3))
    key, value = to_numpy(pool[1]).astype(np.float32)[:, :, :split]
    expected = attend(to_numpy(query[-1:]).astype(np.float32), key, value, np.ones((1, split), bool), DIM**-0.5)
    assert partial[: rows + 1].numel() > LIMIT
    np.testing.assert_allclose(partial[rows], expected[0], atol=0.01)
    assert lse[rows].ne(0).all()


@pytest.mark.parametrize("kernel", [MERGE, MERGE_QUANTIZE], ids=lambda kernel: kernel.operator.name)
def test_parts_behind_two_to_the_31_are_joined(kernel: Kernel) -> None:
    """Two parts of equal weight give their mean."""
    heads = 1
    capacity = LIMIT // (heads * DIM) + 10
    partial = sparse(torch.float32, capacity, heads, DIM)
    lse = sparse(torch.float32, capacity, heads)
    partial[-2:] = torch.randn(2, heads, DIM, generator=torch.Generator().manual_seed(0))
    numbers = [[capacity - 2], [0, 1], [500]]  # first row, starts, lengths
    inputs = [torch.zeros(1, heads, DIM).bfloat16(), partial, lse]
    inputs += [torch.tensor(values, dtype=torch.int32) for values in numbers]
    merged, *scale = run_interpreted(kernel, inputs, {"split_length": 256}, profile_tokens=8)
    found = merged.float().view(-1, DIM)
    if scale:
        found = found * scale[0].view(-1, 1)
    torch.testing.assert_close(found, partial[-2:].mean(0), rtol=0.07, atol=0.01)


@pytest.mark.parametrize("kernel", [GATE_UP, DOWN, FP8_GATE_UP, FP8_DOWN], ids=lambda kernel: kernel.operator.name)
@pytest.mark.parametrize("profile", [8, 8192])
def test_the_last_expert_of_a_large_stack_is_read(
    kernel: Kernel, profile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8,194 experts of 512 × 512: only the last one's weights are not 0, and its token gets their product."""
    monkeypatch.setattr(expert_launch, "MOST_EXPERTS", 10_000)  # so that experts of a large stack may be small
    experts = LIMIT // SIZE**2 + 2
    fp8, gate_up = kernel.operator.name.startswith("Fp8"), kernel.operator.name.endswith("GateUp")
    rng = np.random.default_rng(0)
    values = rng.standard_normal((1, SIZE)).astype(ml_dtypes.float8_e4m3fn if fp8 else ml_dtypes.bfloat16)
    rows = values if gate_up else values[None]
    inputs: list[Any] = [to_torch(rows)] + ([torch.ones(*rows.shape[:-1], SIZE // 128)] if fp8 else [])
    products = []
    for _ in range(2 if gate_up else 1):
        stack = sparse(torch.uint8 if fp8 else torch.int16, experts, SIZE, SIZE)
        weights = (rng.standard_normal((SIZE, SIZE)) / 16).astype(values.dtype)
        stack[-1] = torch.from_numpy(weights.view(np.uint8 if fp8 else np.int16))
        inputs += [stack.view(torch.float8_e4m3fn if fp8 else torch.bfloat16)]
        inputs += [torch.ones(experts, SIZE // 128, SIZE // 128)] if fp8 else []
        products.append(values.astype(np.float64) @ weights.astype(np.float64).T)
    ids = np.array([[experts - 1]], np.int32)
    inputs += [to_torch(ids), to_torch(expert_tokens(ids, experts))]
    attributes = {attribute.name: 16 for attribute in kernel.operator.attributes}
    result, *scale = run_interpreted(kernel, inputs, attributes, gpu=ONE_SM, profile_tokens=profile)
    found = to_numpy(result).astype(np.float64).reshape(1, SIZE)
    if scale:
        found *= np.repeat(to_numpy(scale[0]).reshape(1, -1), 128, axis=1)
    expected = products[0] / (1 + np.exp(-products[0])) * products[1] if gate_up else products[0]
    np.testing.assert_allclose(found, expected, rtol=0.07, atol=0.01 * np.abs(expected).max())
