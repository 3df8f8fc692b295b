"""Finds the kernel of an operator, and its digest for manifests. Kernels are imported only when they are to run."""

import re
from hashlib import sha256
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import angelforge.plugins
from angelforge.errors import AngelForgeError
from angelforge.plugins.kernel import Kernel
from angelforge.plugins.operator import Operator

_WORD = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


def find_kernel(operator: Operator) -> Kernel:
    """The kernel that stands in the operator's folder.

    Raises:
        AngelForgeError: triton is not installed, or the operator has no kernel.
    """
    if find_spec("triton") is None:
        raise AngelForgeError(
            "The plugins' kernels need triton, which is not installed: pip install 'angelforge[triton]'."
        )
    if not _source(operator).is_file():
        raise AngelForgeError(f"The operator {operator.name} has no kernel in this version; run on target cpu.")
    kernel = import_module(f"angelforge.plugins.{folder_of(operator)}.kernel").KERNEL
    assert isinstance(kernel, Kernel)
    return kernel


def kernel_digest(operator: Operator) -> str:
    """sha256 of the operator's kernel, of what kernels share and of the tuning table; "none" without a kernel."""
    if not _source(operator).is_file():
        return "none"
    digest = sha256(_source(operator).read_bytes())
    for file in (*sorted((_root() / "device").glob("*.py")), *_root().glob("tuning.json")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def folder_of(operator: Operator) -> str:
    """`fp8_moe_gate_up` for `Fp8MoEGateUp`."""
    return _WORD.sub("_", operator.name.replace("MoE", "Moe")).lower()


def _root() -> Path:
    return Path(next(iter(angelforge.plugins.__path__)))


def _source(operator: Operator) -> Path:
    return _root() / folder_of(operator) / "kernel.py"
