"""PagedAttention: grouped-query attention of packed tokens over their sequences' pages.

An implementation may leave a sequence in parts, for AttentionMerge to join: with few queries and many keys, thread
blocks share the keys. The body leaves none.
"""

import onnx_ir as ir
from onnxscript import OpBuilder

from angelforge.plugins.body import FLOAT, INT32, f32, for_each_sequence, i64, integer, rows, size, subgraph
from angelforge.plugins.operator import Attribute, AttributeRef, Operator, Port

# Keys of one part of a sequence that thread blocks share. Fixed, so that a decoded token does not depend on what
# else runs; short enough to keep a GPU busy with one sequence, long enough for the parts to stay in its L2 cache.
SPLIT_LENGTH = 256
# Most tokens of a sequence that is left in parts: decoding and draft verification; longer chunks fill a GPU anyway.
SPLIT_QUERIES = 8


def _attend(
    op: OpBuilder, query: ir.Value, cache: ir.Value, positions: ir.Value, length: ir.Value, scale: AttributeRef
) -> ir.Value:
    """f32 [t, Hq, D] of one sequence: query [t, Hq, D], cache [n, 2, Hkv, page_size, D], positions [t], length [1]."""
    by_head = op.Transpose(f32(op, cache), perm=[1, 2, 0, 3, 4])  # [2, Hkv, n, page_size, D]
    flat = op.Reshape(by_head, op.Concat([2], size(op, cache, 2), [-1], size(op, cache, 4), axis=0))
    visible = rows(op, flat, 0, length, axis=2)  # [2, Hkv, L, D]
    key, value = op.Split(visible, axis=0, num_outputs=2, _outputs=2)  # [1, Hkv, L, D] each
    grouped = op.Concat(size(op, query, 0), size(op, cache, 2), [-1], size(op, cache, 4), axis=0)
    q = op.Transpose(op.Reshape(f32(op, query), grouped), perm=[1, 2, 0, 3])  # [Hkv, G, t, D]
    keys = op.Transpose(key, perm=[1, 0, 3, 2])  # [Hkv, 1, D, L]
    scores = op.Mul(op.MatMul(q, keys), op.Constant(value_float=scale.as_("value_float")))  # [Hkv, G, t, L]
    past = op.LessOrEqual(op.Range(0, op.Squeeze(length, [0]), 1), op.Unsqueeze(positions, [1]))  # [t, L]
    weights = op.Softmax(op.Where(past, scores, float("-inf")), axis=-1)
    mixed = op.MatMul(weights, op.Transpose(value, perm=[1, 0, 2, 3]))  # [Hkv, G, t, D]
    return op.Reshape(op.Transpose(mixed, perm=[2, 0, 1, 3]), op.Shape(query))


def _body(
    op: OpBuilder,
    query: ir.Value,
    kv_cache: ir.Value,
    page_table: ir.Value,
    query_start: ir.Value,
    kv_length: ir.Value,
    positions: ir.Value,
    scale: AttributeRef,
    split_length: AttributeRef,
    split_queries: AttributeRef,
) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value]:
    starts, lengths, places = i64(op, query_start), i64(op, kv_length), i64(op, positions)
    page_size = size(op, kv_cache, 3)

    def append(op: OpBuilder, here: ir.Value, start: ir.Value, end: ir.Value, done: ir.Value) -> ir.Value:
        def attend(op: OpBuilder) -> ir.Value:
            length = op.Gather(lengths, here)
            used = op.Div(op.Sub(op.Add(length, page_size), [1]), page_size)
            pages = rows(op, op.Squeeze(op.Gather(page_table, here), [0]), 0, used)
            own = rows(op, query, start, end)
            result = _attend(op, own, op.Gather(kv_cache, pages, axis=0), rows(op, places, start, end), length, scale)
            return op.Concat(done, result, axis=0)

        return op.If(
            op.Squeeze(op.Less(start, end), [0]),
            then_branch=subgraph(op, attend, [], [ir.val(None, FLOAT)], "attend"),
            else_branch=subgraph(op, lambda op: op.Identity(done), [], [ir.val(None, FLOAT)], "empty"),
        )

    head_shape = op.Shape(query, start=1)
    zero = ir.tensor([0.0], dtype=FLOAT)
    nothing = op.ConstantOfShape(op.Concat([0], head_shape, axis=0), value=zero)
    done = for_each_sequence(op, starts, nothing, append)
    # Rows that belong to no sequence are padding.
    padding = op.Concat(op.Sub(size(op, query, 0), size(op, done, 0)), head_shape, axis=0)
    direct = op.CastLike(op.Concat(done, op.ConstantOfShape(padding, value=zero), axis=0), query)

    pool_tokens = op.Mul(size(op, kv_cache, 0), page_size)
    splits = op.Add(op.Div(pool_tokens, integer(op, split_length)), size(op, kv_length, 0))
    capacity = op.Mul(splits, integer(op, split_queries))
    partial = op.ConstantOfShape(op.Concat(capacity, head_shape, axis=0), value=zero)
    lse = op.ConstantOfShape(op.Concat(capacity, size(op, query, 1), axis=0), value=zero)
    all_direct = op.ConstantOfShape(op.Shape(kv_length), value=ir.tensor([-1], dtype=INT32))
    return direct, partial, lse, all_direct


PAGED_ATTENTION = Operator(
    name="PagedAttention",
    doc="A query at position p of a sequence sees cache positions ≤ p of that sequence and nothing else. Query heads "
    "are grouped over key/value heads in order (Ainslie et al. 2023, arXiv 2305.13245); rows outside every sequence "
    "give 0. A sequence with partial_start ≥ 0 is left in parts as AttentionMerge describes them (at most "
    "split_queries tokens, split_length keys a part, lse = log Σ exp of its scores, −inf where no key is visible); "
    "the others have partial_start −1 and stand in direct. Rows that no sequence uses are unspecified.",
    inputs=(
        Port("query", "A", ("T", "Hq", "D")),
        Port("kv_cache", "A", ("pages", 2, "Hkv", "page_size", "D"), "with this step's keys and values written"),
        Port("page_table", "INT32", ("B", "P")),
        Port("query_start", "INT32", ("B1",)),
        Port("kv_length", "INT32", ("B",)),
        Port("positions", "INT32", ("T",)),
    ),
    outputs=(
        Port("direct", "A", ("T", "Hq", "D")),
        Port("partial", "FLOAT", ("C", "Hq", "D")),
        Port("lse", "FLOAT", ("C", "Hq")),
        Port("partial_start", "INT32", ("B",)),
    ),
    attributes=(
        Attribute("scale", float, "of the scores, 1/√head_dim"),
        Attribute("split_length", int, "keys of one part"),
        Attribute("split_queries", int, "most tokens of a sequence that is left in parts"),
    ),
    types={"A": ("FLOAT", "BFLOAT16")},
    derive={"C": lambda d: (d["pages"] * d["page_size"] // d["split_length"] + d["B"]) * d["split_queries"]},
    body=_body,
)
