"""What a call must read, write and compute at least, and how long a GPU needs for that at its nominal rates.

Every byte is counted once. Of a table or stack only what is used counts: rows that ids name, experts that have tokens,
keys that are visible.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import onnx_ir as ir

from angelforge.plugins.binding import Binding, bind
from angelforge.plugins.operator import Port
from angelforge.tools.kernel_bench.work import Work

Used = Mapping[str, int]  # numbers that depend on the values of a call: see `measure`


@dataclass(frozen=True)
class Cost:
    """Bytes moved, and floating-point operations (an addition and a multiplication are two)."""

    nbytes: int
    flops: int

    def seconds(self, bandwidth: float, flops: float) -> float:
        """The least time at these rates, in bytes/s and FLOP/s."""
        return max(self.nbytes / bandwidth, self.flops / flops)


def port_types(work: Work) -> list[ir.DataType]:
    """Element types of the inputs on a GPU: bf16 where an operator leaves a choice."""
    return [
        ir.DataType.BFLOAT16 if port.type in work.operator.types else ir.DataType[port.type]
        for port in work.operator.inputs
    ]


def port_shape(work: Work, port: Port) -> tuple[int, ...]:
    """The sizes of an input."""
    return tuple(symbol if isinstance(symbol, int) else work.dims[symbol] for symbol in port.shape)


def binding_of(work: Work) -> Binding:
    """The call's binding."""
    shapes = [port_shape(work, port) for port in work.operator.inputs]
    return bind(work.operator, shapes, port_types(work), work.attributes)


def cost_of(work: Work, experts: int = 0) -> Cost:
    """The cost of a call; `experts` is the number of different experts that its tokens take."""
    binding, operator = binding_of(work), work.operator
    nbytes = 0.0
    for port, shape in [
        *((port, port_shape(work, port)) for port in operator.inputs),
        *zip(operator.outputs, binding.output_shapes, strict=True),
    ]:
        nbytes += _elements(work, port, shape, experts) * binding.types[port.name].itemsize
    return Cost(int(nbytes), _flops(work, binding))


def _elements(work: Work, port: Port, shape: tuple[int, ...], experts: int) -> int:
    """Elements of a port that are read or written."""
    size, dims = prod(shape), work.dims
    if port.shape[:1] == ("E",) and "k" in dims and port.name != "expert_tokens":
        return experts * prod(shape[1:])
    if port.name == "table" or port.name.startswith("rope_"):
        return dims["T"] * shape[1]
    if port.name in ("kv_cache", "kv_cache_out"):
        per_key = 2 * dims["Hkv"] * dims["D"]
        if work.sequences is not None:
            return sum(work.sequences.lengths) * per_key
        return dims["T"] * per_key if port.name == "kv_cache_out" else 0
    if work.sequences is not None and port.name in ("direct", "partial", "lse"):
        parts, whole = partial_rows(work)
        return (whole if port.name == "direct" else parts) * prod(shape[1:])
    return size


def partial_rows(work: Work) -> tuple[int, int]:
    """(rows that attention leaves in parts, tokens that it does not): decoding is split, prompts are not."""
    from angelforge.plugins.paged_attention.operator import SPLIT_LENGTH, SPLIT_QUERIES

    assert work.sequences is not None
    pairs = list(zip(work.sequences.items, work.sequences.lengths, strict=True))
    parts = sum(t * -(-length // SPLIT_LENGTH) for (_, t), length in pairs if t <= SPLIT_QUERIES)
    return parts, sum(t for (_, t), _ in pairs if t > SPLIT_QUERIES)


def _flops(work: Work, binding: Binding) -> int:
    """Of matmuls and attention; all else is bound by memory."""
    d, name = binding.dims, work.operator.name.removeprefix("Fp8")
    if name == "Linear":
        return int(2 * d["T"] * d["K"] * d["N"])
    if name == "GateUp":
        return int(4 * d["T"] * d["H"] * d["F"])
    if name == "MoELogits":
        return int(2 * d["T"] * d["H"] * d["E"])
    if name in ("MoEGateUp", "MoEDown"):
        return int((4 if name == "MoEGateUp" else 2) * d["T"] * d["k"] * d["H"] * d["I"])
    if name == "PagedAttention" and work.sequences is not None:
        visible = sum(t * h + t * (t + 1) // 2 for h, t in work.sequences.items)
        return int(4 * visible * d["Hq"] * d["D"])
    return 0
