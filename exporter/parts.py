"""The smallest modules of the model: projections and norms, named and shaped as in the checkpoint."""

from dataclasses import dataclass
from typing import TypeAlias

import onnx_ir as ir
from onnxscript import OpBuilder, nn

from angelforge.config import ModelConfig
from angelforge.draft_config import DraftConfig
from angelforge.dtypes import DType
from angelforge.plugins.add_norm.operator import ADD_NORM
from angelforge.plugins.add_norm_quantize.operator import ADD_NORM_QUANTIZE
from angelforge.plugins.fp8_body import BLOCK
from angelforge.plugins.fp8_linear.operator import FP8_LINEAR
from angelforge.plugins.linear.operator import LINEAR
from angelforge.plugins.norm.operator import NORM
from angelforge.plugins.norm_quantize.operator import NORM_QUANTIZE
from angelforge.plugins.operator import call
from angelforge.precision import Precision

Activation: TypeAlias = ir.Value | tuple[ir.Value, ...]  # [T, K], or its (e4m3, scales)


def onnx_type(dtype: DType) -> ir.DataType:
    """The same element type as onnx_ir names it."""
    return ir.DataType(dtype.onnx)


def weight(dtype: DType, *shape: int) -> nn.Parameter:
    """A parameter without data: its bytes stand in the bundle's weight files."""
    return nn.Parameter(list(shape), dtype=onnx_type(dtype))


@dataclass(frozen=True)
class Normed:
    """A normalised activation: as it is, and for FP8 matmuls also as e4m3 with scales."""

    plain: ir.Value  # [T, H]
    quantized: tuple[ir.Value, ir.Value] | None = None  # e4m3 [T, H], f32 [T, ⌈H/128⌉]

    @property
    def for_matmul(self) -> Activation:
        """What the matmuls of the bundle's precision take."""
        return self.plain if self.quantized is None else self.quantized


class Weights(nn.Module):  # type: ignore[misc]
    """A weight of the checkpoint that an operator takes; in FP8 its block scales come with it."""

    def __init__(self, dtype: DType, *shape: int) -> None:
        super().__init__()
        self.weight = weight(dtype, *shape)
        self.weight_scale_inv = None
        if dtype is DType.F8_E4M3:
            *stack, rows, columns = shape
            self.weight_scale_inv = weight(DType.F32, *stack, -(-rows // BLOCK), -(-columns // BLOCK))

    def forward(self, op: OpBuilder) -> tuple[ir.Value, ...]:
        """(weight,) or (weight, scales)."""
        return (self.weight,) if self.weight_scale_inv is None else (self.weight, self.weight_scale_inv)


def flat(activation: Activation) -> tuple[ir.Value, ...]:
    """The values an operator takes for it: one, or e4m3 and scales."""
    return activation if isinstance(activation, tuple) else (activation,)


class Projection(Weights):
    """y [T, out] = x [T, in] · weight [out, in]ᵀ."""

    def __init__(self, inputs: int, outputs: int, dtype: DType, result: DType) -> None:
        super().__init__(dtype, outputs, inputs)
        self.result = result

    def forward(self, op: OpBuilder, x: Activation) -> ir.Value:  # type: ignore[override]
        """x [T, in] → [T, out]."""
        operator = LINEAR if self.weight_scale_inv is None else FP8_LINEAR
        return call(op, operator, *flat(x), *super().forward(op), dtype=self.result.onnx)


def projection(inputs: int, outputs: int, precision: Precision) -> Projection:
    """A projection in the bundle's precision."""
    return Projection(inputs, outputs, precision.matmul, precision.activation)


class ResidualNorm(nn.Module):  # type: ignore[misc]
    """Adds what the previous block made to the residual stream and normalises the sum."""

    def __init__(self, config: ModelConfig | DraftConfig, precision: Precision, quantize: bool) -> None:
        super().__init__()
        self.weight = weight(precision.activation, config.hidden_size)
        self.epsilon = config.rms_norm_eps
        self.quantize = quantize

    def forward(self, op: OpBuilder, residual: ir.Value, delta: ir.Value | None) -> tuple[ir.Value, Normed]:
        """residual, delta [T, H] → (new residual, normed); without a delta the residual stays."""
        if delta is None:
            operator = NORM_QUANTIZE if self.quantize else NORM
            result = call(op, operator, residual, self.weight, epsilon=self.epsilon)
            outputs = result if self.quantize else (result,)
        else:
            operator = ADD_NORM_QUANTIZE if self.quantize else ADD_NORM
            residual, *outputs = call(op, operator, residual, delta, self.weight, epsilon=self.epsilon)
        plain, *quantized = outputs
        return residual, Normed(plain, tuple(quantized) if quantized else None)
