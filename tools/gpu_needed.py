"""What a benchmark on a GPU needs of a machine, told before anything is loaded."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from angelforge.errors import AngelForgeError

if TYPE_CHECKING:
    from angelforge.plugins.tensorrt.gpu import GpuFacts


def require_gpu(command: str) -> GpuFacts:
    """The first GPU, when everything is there for `command` ("bench kernels") to use it.

    Raises:
        AngelForgeError: something is missing; the message says what.
    """
    from angelforge.plugins.tensorrt.gpu import find_gpu

    facts = find_gpu()
    if facts is None:
        raise AngelForgeError(
            "This machine has no NVIDIA GPU, or its driver does not work (see angelforge doctor), so there is nothing "
            f"to measure: run {command} on a machine with one, see docs/measurements/README.md."
        )
    require_kernels(command)
    import torch

    if not torch.cuda.is_available():
        raise AngelForgeError(f"torch {torch.__version__} cannot use the {facts.name}; install torch built for CUDA.")
    return facts


def require_kernels(command: str) -> None:
    """Raises AngelForgeError where kernels cannot even be compiled for `command`."""
    missing = [name for name in ("torch", "triton") if find_spec(name) is None]
    if missing:
        raise AngelForgeError(f"{command} needs {' and '.join(missing)}: pip install 'angelforge[torch,triton]'.")
