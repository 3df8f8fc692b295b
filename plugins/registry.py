"""All operators of the domain `angelforge`."""

import onnx_ir as ir

from angelforge.plugins.add_norm.operator import ADD_NORM
from angelforge.plugins.add_norm_quantize.operator import ADD_NORM_QUANTIZE
from angelforge.plugins.all_reduce.operator import ALL_REDUCE
from angelforge.plugins.attention_merge.operator import ATTENTION_MERGE
from angelforge.plugins.attention_merge_quantize.operator import ATTENTION_MERGE_QUANTIZE
from angelforge.plugins.embedding.operator import EMBEDDING
from angelforge.plugins.fp8_gate_up.operator import FP8_GATE_UP
from angelforge.plugins.fp8_linear.operator import FP8_LINEAR
from angelforge.plugins.fp8_moe_down.operator import FP8_MOE_DOWN
from angelforge.plugins.fp8_moe_gate_up.operator import FP8_MOE_GATE_UP
from angelforge.plugins.gate_up.operator import GATE_UP
from angelforge.plugins.linear.operator import LINEAR
from angelforge.plugins.moe_combine.operator import MOE_COMBINE
from angelforge.plugins.moe_down.operator import MOE_DOWN
from angelforge.plugins.moe_gate_up.operator import MOE_GATE_UP
from angelforge.plugins.moe_logits.operator import MOE_LOGITS
from angelforge.plugins.moe_route.operator import MOE_ROUTE
from angelforge.plugins.norm.operator import NORM
from angelforge.plugins.norm_quantize.operator import NORM_QUANTIZE
from angelforge.plugins.operator import Operator
from angelforge.plugins.paged_attention.operator import PAGED_ATTENTION
from angelforge.plugins.qkv_prepare.operator import QKV_PREPARE
from angelforge.plugins.qkv_rotate.operator import QKV_ROTATE

OPERATORS: dict[str, Operator] = {
    operator.name: operator
    for operator in (
        EMBEDDING,
        NORM,
        ADD_NORM,
        LINEAR,
        QKV_PREPARE,
        QKV_ROTATE,
        PAGED_ATTENTION,
        ATTENTION_MERGE,
        GATE_UP,
        MOE_LOGITS,
        MOE_ROUTE,
        MOE_GATE_UP,
        MOE_DOWN,
        MOE_COMBINE,
        ALL_REDUCE,
        NORM_QUANTIZE,
        ADD_NORM_QUANTIZE,
        FP8_LINEAR,
        ATTENTION_MERGE_QUANTIZE,
        FP8_GATE_UP,
        FP8_MOE_GATE_UP,
        FP8_MOE_DOWN,
    )
}


def functions_used(graph: ir.Graph) -> list[ir.Function]:
    """The function bodies of the operators that stand in `graph`, in the registry's order."""
    used = {node.op_type for node in graph if node.domain == "angelforge"}
    return [operator.function() for name, operator in OPERATORS.items() if name in used]
