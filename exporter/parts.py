"""The smallest modules of the model: a projection and the two norms, named and shaped as in the checkpoint."""

import onnx_ir as ir
from onnxscript import OpBuilder, nn

from angelforge.dtypes import DType
from angelforge.plugins.add_norm.operator import ADD_NORM
from angelforge.plugins.linear.operator import LINEAR
from angelforge.plugins.norm.operator import NORM
from angelforge.plugins.operator import call


def onnx_type(dtype: DType) -> ir.DataType:
    """The same element type as onnx_ir names it."""
    return ir.DataType(dtype.onnx)


def weight(dtype: DType, *shape: int) -> nn.Parameter:
    """A parameter without data: its bytes stand in the bundle's weight files."""
    return nn.Parameter(list(shape), dtype=onnx_type(dtype))


class Projection(nn.Module):  # type: ignore[misc]
    """y [T, out] = x [T, in] · weight [out, in]ᵀ."""

    def __init__(self, inputs: int, outputs: int, dtype: DType, result: DType) -> None:
        super().__init__()
        self.weight = weight(dtype, outputs, inputs)
        self.result = result

    def forward(self, op: OpBuilder, x: ir.Value) -> ir.Value:
        """x [T, in] → [T, out]."""
        return call(op, LINEAR, x, self.weight, dtype=self.result.onnx)


class Weights(nn.Module):  # type: ignore[misc]
    """A weight of the checkpoint that an operator takes beside others."""

    def __init__(self, dtype: DType, *shape: int) -> None:
        super().__init__()
        self.weight = weight(dtype, *shape)

    def forward(self, op: OpBuilder) -> ir.Value:
        """The weight itself."""
        return self.weight


class ResidualNorm(nn.Module):  # type: ignore[misc]
    """Adds what the previous block made to the residual stream and normalises the sum."""

    def __init__(self, width: int, epsilon: float, dtype: DType) -> None:
        super().__init__()
        self.weight = weight(dtype, width)
        self.epsilon = epsilon

    def forward(self, op: OpBuilder, residual: ir.Value, delta: ir.Value | None) -> tuple[ir.Value, ir.Value]:
        """residual, delta [T, H] → (new residual, normed); without a delta the residual stays."""
        if delta is None:
            return residual, call(op, NORM, residual, self.weight, epsilon=self.epsilon)
        total, normed = call(op, ADD_NORM, residual, delta, self.weight, epsilon=self.epsilon)
        return total, normed
