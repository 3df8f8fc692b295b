"""The two kinds of MLP: dense SwiGLU, and the mixture of routed and shared experts."""

from dataclasses import dataclass

import onnx_ir as ir
from onnxscript import OpBuilder, nn

from angelforge.config import ModelConfig
from angelforge.draft_config import DraftConfig
from angelforge.dtypes import DType
from angelforge.exporter.parts import Normed, Weights, flat, projection, weight
from angelforge.plugins.all_reduce.operator import ALL_REDUCE
from angelforge.plugins.fp8_gate_up.operator import FP8_GATE_UP
from angelforge.plugins.fp8_moe_down.operator import FP8_MOE_DOWN
from angelforge.plugins.fp8_moe_gate_up.operator import FP8_MOE_GATE_UP
from angelforge.plugins.gate_up.operator import GATE_UP
from angelforge.plugins.moe_combine.operator import MOE_COMBINE
from angelforge.plugins.moe_down.operator import MOE_DOWN
from angelforge.plugins.moe_gate_up.operator import MOE_GATE_UP
from angelforge.plugins.moe_logits.operator import MOE_LOGITS
from angelforge.plugins.moe_route.operator import MOE_ROUTE
from angelforge.plugins.operator import call
from angelforge.precision import Precision


class DenseMLP(nn.Module):  # type: ignore[misc]
    """`mlp` of the first layers: down(silu(gate(x)) · up(x))."""

    def __init__(self, config: ModelConfig | DraftConfig, precision: Precision) -> None:
        super().__init__()
        width, hidden = config.intermediate_size, config.hidden_size
        self.operator = FP8_GATE_UP if precision.quantized else GATE_UP
        self.gate_proj = Weights(precision.matmul, width, hidden)
        self.up_proj = Weights(precision.matmul, width, hidden)
        self.down_proj = projection(width, hidden, precision)

    def forward(self, op: OpBuilder, normed: Normed, num_tokens: ir.Value) -> ir.Value:
        """normed [T, H] → what the MLP adds to the residual [T, H]."""
        inner = call(op, self.operator, *flat(normed.for_matmul), *self.gate_proj(op), *self.up_proj(op))
        return call(op, ALL_REDUCE, self.down_proj(op, inner))


@dataclass(frozen=True)
class Routing:
    """Which experts take which tokens; k = routed and shared experts of a token."""

    expert_ids: ir.Value  # int32 [T, k]
    expert_weights: ir.Value  # f32 [T, k]
    expert_tokens: ir.Value  # int32 [E, words], a bit a token


class Router(nn.Module):  # type: ignore[misc]
    """`mlp.gate`: f32 whatever the precision."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = weight(DType.F32, config.num_experts, config.hidden_size)
        self.expert_bias = weight(DType.F32, config.num_experts)

    def forward(self, op: OpBuilder, normed: ir.Value, num_tokens: ir.Value) -> Routing:
        """normed [T, H] → the choice of every token, shared experts last."""
        config = self.config
        choice = call(
            op,
            MOE_ROUTE,
            call(op, MOE_LOGITS, normed, self.weight),
            self.expert_bias,
            num_tokens,
            top_k=config.num_experts_per_tok,
            n_group=config.n_group,
            topk_group=config.topk_group,
            num_shared_experts=config.num_shared_experts,
            routed_scaling_factor=config.routed_scaling_factor,
        )
        return Routing(*choice)


class Experts(nn.Module):  # type: ignore[misc]
    """`mlp.experts`: routed and shared experts in one stack of E; a shared expert is one that every token takes."""

    def __init__(self, config: ModelConfig, precision: Precision) -> None:
        super().__init__()
        self.config = config
        self.precision = precision
        experts, width, hidden = config.num_expert_slots, config.moe_intermediate_size, config.hidden_size
        self.gate_proj = Weights(precision.matmul, experts, width, hidden)
        self.up_proj = Weights(precision.matmul, experts, width, hidden)
        self.down_proj = Weights(precision.matmul, experts, hidden, width)

    def forward(self, op: OpBuilder, normed: Normed, routing: Routing) -> ir.Value:
        """normed [T, H] → the weighted sum over each token's experts [T, H]."""
        quantized, chosen = self.precision.quantized, (routing.expert_ids, routing.expert_tokens)
        gate_up = FP8_MOE_GATE_UP if quantized else MOE_GATE_UP
        inner = call(op, gate_up, *flat(normed.for_matmul), *self.gate_proj(op), *self.up_proj(op), *chosen)
        down = (*flat(inner), *self.down_proj(op), *chosen)
        if quantized:
            expert_out = call(op, FP8_MOE_DOWN, *down, dtype=self.precision.activation.onnx)
        else:
            expert_out = call(op, MOE_DOWN, *down)
        shared = self.config.num_shared_experts
        return call(op, MOE_COMBINE, expert_out, routing.expert_weights, num_shared_experts=shared)


class SparseMLP(nn.Module):  # type: ignore[misc]
    """`mlp` of the other layers: router and experts."""

    def __init__(self, config: ModelConfig, precision: Precision) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config, precision)

    def forward(self, op: OpBuilder, normed: Normed, num_tokens: ir.Value) -> ir.Value:
        """normed [T, H] → what the MLP adds to the residual [T, H]."""
        routing = self.gate(op, normed.plain, num_tokens)
        return call(op, ALL_REDUCE, self.experts(op, normed, routing))
