"""What launches raise, how a report tells it, and whether the GPU is of use afterwards."""

from subprocess import SubprocessError

from angelforge.errors import AngelForgeError
from angelforge.plugins.compile import COMPILE_ERRORS

# What launching is known to raise, ours or others': a call or a tile that is refused, a missing part, a compiler (of C,
# too: Triton makes a stub for every signature) that fails or is not there, no memory.
LAUNCH_ERRORS: tuple[type[Exception], ...] = (
    *COMPILE_ERRORS, ImportError, AttributeError, TypeError, LookupError, AssertionError, ArithmeticError, OSError,
    SubprocessError,
)  # fmt: skip
MOST = 240  # characters of a reason


def answers(device: str) -> bool:
    """Whether the GPU can still be used; after some errors no call of the process ever succeeds again."""
    import torch

    if device != "cuda":
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def reason(error: BaseException) -> str:
    """An exception in a short line that fits a table; of our own ones the sentence alone."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    kind = "" if isinstance(error, AngelForgeError) else f"{type(error).__name__}: "
    return (kind + lines[0].strip())[:MOST].replace("|", "/")
