"""What a call must give: by the operator's function body in an ONNX tool on the CPU, or in plain torch."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray

from angelforge.engines.onnxruntime_graph import ONNXRUNTIME_ERRORS
from angelforge.errors import AngelForgeError
from angelforge.runtime.validate.bodies import run_body, run_reference
from angelforge.tools.kernel_bench.plain import plain_outputs
from angelforge.tools.kernel_bench.work import Work

# Their bodies add or multiply in bf16, which ONNX Runtime cannot on a CPU: onnx's evaluator runs them.
IN_BF16 = {"Norm", "AddNorm", "NormQuantize", "AddNormQuantize", "MoECombine", "Embedding"}
_BITS: dict[torch.dtype, tuple[torch.dtype, Any]] = {
    torch.bfloat16: (torch.int16, ml_dtypes.bfloat16),
    torch.float8_e4m3fn: (torch.uint8, ml_dtypes.float8_e4m3fn),
}
BODY_ERRORS: tuple[type[Exception], ...] = (*ONNXRUNTIME_ERRORS, TypeError)
BODY_TOKENS = 128  # most tokens of a real-size call whose body a CPU follows, where plain torch has no such operator


def by_body(work: Work, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The function body's outputs, on the CPU.

    Raises:
        AngelForgeError: this machine's ONNX tools cannot run it.
    """
    run = run_reference if work.operator.name in IN_BF16 else run_body
    arrays = [to_numpy(x) for x in inputs]
    try:
        return [to_torch(array) for array in run(work.operator, arrays, work.attributes)]
    except BODY_ERRORS as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise AngelForgeError(
            f"The function body of {work.operator.name} does not run on this machine ({reason}); it needs onnx and "
            "onnxruntime as pyproject.toml names them."
        ) from error


def by_torch(work: Work, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor] | None:
    """Plain torch's outputs on the inputs' device; the body's where there is no such formulation.

    None where a call is too large for its body, or no body runs here, which the checks at small sizes then tell.
    """
    named = dict(zip((port.name for port in work.operator.inputs), inputs, strict=True))
    found = plain_outputs(work.operator.name, named, work.attributes)
    if found is None and work.tokens <= BODY_TOKENS:
        with suppress(AngelForgeError):
            return by_body(work, inputs)
    return found


def to_numpy(tensor: torch.Tensor) -> NDArray[Any]:
    """An array of the same values and type, bf16 and FP8 as ml_dtypes; copied from another device."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype not in _BITS:
        return np.asarray(tensor.numpy())
    bits, dtype = _BITS[tensor.dtype]
    return np.asarray(tensor.view(bits).numpy().view(dtype))


def to_torch(array: NDArray[Any]) -> torch.Tensor:
    """A tensor of the same values and type, bf16 and FP8 included; memory is not shared."""
    array = np.array(array, order="C")
    for dtype, (bits, numpy_dtype) in _BITS.items():
        if array.dtype == numpy_dtype:
            return torch.from_numpy(array.view(f"i{array.itemsize}" if bits == torch.int16 else "u1")).view(dtype)
    return torch.from_numpy(array)
