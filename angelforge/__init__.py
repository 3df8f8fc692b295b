"""AngelForge compiles BailingMoeV2 mixture-of-experts language models and runs them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from angelforge.runtime.llm import LLM as LLM
    from angelforge.runtime.sampling import SamplingParams as SamplingParams

__version__ = "0.1.0"

_LAZY = {"LLM": "angelforge.runtime.llm", "SamplingParams": "angelforge.runtime.sampling"}


def __getattr__(name: str) -> Any:
    # Loaded on first use: `import angelforge` stays free of ONNX Runtime and friends.
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'angelforge' has no attribute {name!r}")
