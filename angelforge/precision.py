"""Precisions of a bundle and what each means for weights, activations and the KV pool."""

import enum

from angelforge.dtypes import DType


class Precision(enum.Enum):
    """Number formats of one bundle.

    `fp32` is what a CPU runs and what parity is judged against. `bf16` keeps weights, activations and KV pool in
    bfloat16. `fp8` stores quantised linears and experts in e4m3 with 128×128 weight scales, the rest in bfloat16.
    """

    FP32 = "fp32"
    BF16 = "bf16"
    FP8 = "fp8"

    @property
    def activation(self) -> DType:
        """Type of activations, norm weights, embedding, head and KV pool."""
        return DType.F32 if self is Precision.FP32 else DType.BF16

    @property
    def matmul(self) -> DType:
        """Type of the weights of linears and experts."""
        return DType.F8_E4M3 if self is Precision.FP8 else self.activation

    @property
    def quantized(self) -> bool:
        """Whether linears and experts carry block scales."""
        return self is Precision.FP8
