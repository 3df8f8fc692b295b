"""Precisions of a bundle and what each means for weights, activations and the KV pool."""

import enum

from angelforge.config import ModelConfig
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


def natural_precision(config: ModelConfig) -> Precision:
    """The precision that keeps a checkpoint's own numbers: FP8 as it is, f32 as f32, anything else as bf16."""
    if config.quantization is not None:
        return Precision.FP8
    return Precision.FP32 if config.torch_dtype == "float32" else Precision.BF16
