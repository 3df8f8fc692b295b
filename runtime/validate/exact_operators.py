"""What FP8 operators compute without rounding: activations in f32, the stored weights times their scales.

Weights are widened inside, those of experts one expert at a time: memory is one matrix in f32, and of a mixture of
experts one expert's.
"""

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
from onnxscript import OpBuilder, build_function

from angelforge.plugins.body import linear, size, swiglu
from angelforge.plugins.fp8_body import dequantize_weight
from angelforge.plugins.moe_body import for_each_expert, token_of_entry
from angelforge.plugins.operator import OPSET

EXACT_DOMAIN = "angelforge.exact"
Value = ir.Value


def _linear(op: OpBuilder, x: Value, weight: Value, scale: Value) -> Value:
    return linear(op, x, dequantize_weight(op, weight, scale))


def _gate_up(op: OpBuilder, x: Value, gate: Value, gate_scale: Value, up: Value, up_scale: Value) -> Value:
    return swiglu(op, _linear(op, x, gate, gate_scale), _linear(op, x, up, up_scale))


def _moe_gate_up(
    op: OpBuilder, x: Value, gate: Value, gate_scale: Value, up: Value, up_scale: Value, ids: Value, tokens: Value
) -> Value:
    def compute(op: OpBuilder, entries: Value, *expert: Value) -> Value:
        return _gate_up(op, op.Gather(x, token_of_entry(op, entries, ids), axis=0), *expert)

    return for_each_expert(op, ids, [gate, gate_scale, up, up_scale], size(op, gate, 1), compute)


def _moe_down(op: OpBuilder, inner: Value, down: Value, scale: Value, ids: Value, tokens: Value) -> Value:
    flat = op.Reshape(inner, op.Concat([-1], size(op, inner, 2), axis=0))  # [T·k, I]

    def compute(op: OpBuilder, entries: Value, *expert: Value) -> Value:
        return _linear(op, op.Gather(flat, entries, axis=0), *expert)

    return for_each_expert(op, ids, [down, scale], size(op, down, 1), compute)


#: By the FP8 operator whose place it takes: how many inputs a body has, and the body.
_BODIES: dict[str, tuple[int, Callable[..., Any]]] = {
    "Fp8Linear": (3, _linear),
    "Fp8GateUp": (5, _gate_up),
    "Fp8MoEGateUp": (7, _moe_gate_up),
    "Fp8MoEDown": (5, _moe_down),
}


def exact_function(kind: str) -> ir.Function:
    """The ONNX function that stands for the FP8 operator `kind`: it has the same name, in a domain of its own.

    Its inputs are the operator's, activations in f32 and without their scales; its output is f32.
    """
    inputs, body = _BODIES[kind]
    return build_function(
        lambda op, *values: body(op, *values),
        [ir.val(f"input_{number}") for number in range(inputs)],
        domain=EXACT_DOMAIN,
        name=kind,
        opset_imports={"": OPSET},
    )
