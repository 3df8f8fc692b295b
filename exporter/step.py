"""The inputs of one packed call, as graph values (DESIGN.md, graph inputs; `runtime/batch.py` is their other end)."""

from dataclasses import dataclass

import onnx_ir as ir
from onnxscript import GraphBuilder

INT32 = ir.DataType.INT32
INT64 = ir.DataType.INT64


@dataclass(frozen=True)
class Step:
    """Bookkeeping of T packed tokens of B sequences, of which R rows want logits."""

    input_ids: ir.Value  # int64 [T]
    positions: ir.Value  # int32 [T]
    num_tokens: ir.Value  # int32 [1], rows from here on are padding
    query_start: ir.Value  # int32 [B+1]
    kv_length: ir.Value  # int32 [B]
    page_table: ir.Value  # int32 [B, P]
    slots: ir.Value  # int32 [T], page · page_size + offset
    logit_indices: ir.Value  # int64 [R]
    rank: ir.Value | None = None  # int64 [1], in graphs for several ranks: all by which one differs from another

    @classmethod
    def inputs(cls, builder: GraphBuilder, ranks: int = 1) -> "Step":
        """Declares them on the graph, in this order."""
        return cls(
            input_ids=builder.input("input_ids", INT64, ["T"]),
            positions=builder.input("positions", INT32, ["T"]),
            num_tokens=builder.input("num_tokens", INT32, [1]),
            query_start=builder.input("query_start", INT32, ["B+1"]),
            kv_length=builder.input("kv_length", INT32, ["B"]),
            page_table=builder.input("page_table", INT32, ["B", "P"]),
            slots=builder.input("slots", INT32, ["T"]),
            logit_indices=builder.input("logit_indices", INT64, ["R"]),
            rank=builder.input("rank", INT64, [1]) if ranks > 1 else None,
        )
