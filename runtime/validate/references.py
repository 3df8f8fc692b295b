"""References that users name: Hugging Face transformers, the project's NumPy model, or any Python function.

Only code that the user names is run, and none of a checkpoint.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from angelforge.bundle import Bundle
from angelforge.config import ModelConfig
from angelforge.config_reading import MODEL_TYPES
from angelforge.errors import AngelForgeError, UsageError
from angelforge.precision import Precision
from angelforge.runtime.validate.cutting import Array
from angelforge.runtime.validate.fp8_reference import Fp8Reference
from angelforge.runtime.validate.plain_checkpoint import as_packed, checkpoint_config, checkpoint_tensors
from angelforge.runtime.validate.reference import KEPT, Reference
from angelforge.runtime.validate.runners import Compute
from angelforge.runtime.validate.transformers_reference import (
    as_glm4_moe,
    knows,
    native_logits,
    require_transformers,
)

Logits = Callable[[Array], Array]  # int64 [n] → [n, vocab]
FORMS = "numpy:CHECKPOINT, transformers:CHECKPOINT or MODULE:FUNCTION"


def load_reference_for(text: str, bundle: Bundle) -> Compute:
    """What `text` names, for a `ReferenceRunner`: "numpy:DIR", "transformers:DIR" or "module:function".

    Raises:
        UsageError: `text` names nothing that can be called.
        AngelForgeError: a package is missing or refuses the checkpoint.
    """
    kind, colon, rest = text.partition(":")
    if not colon or not kind or not rest:
        raise UsageError(f"--reference is {text!r}, but one of {FORMS} is needed.")
    if kind == "numpy":
        return _of_vocabulary(_traced(numpy_reference(Path(rest), bundle)), text, bundle)
    if kind == "transformers":
        return _of_vocabulary(_transformers(rest, bundle), text, bundle)
    logits = _function(kind, rest)
    return _of_vocabulary(lambda ids: {"logits": logits(ids)}, text, bundle)


def _of_vocabulary(compute: Compute, name: str, bundle: Bundle) -> Compute:
    """The same; it raises AngelForgeError where the logits are of another vocabulary than the bundle's."""
    width = bundle.manifest.model.vocab_size

    def checked(ids: Array) -> Mapping[str, Array]:
        values = compute(ids)
        if values["logits"].shape[-1] != width:
            raise AngelForgeError(
                f"The reference {name} gave logits of {values['logits'].shape[-1]} ids, but the bundle's vocabulary "
                f"has {width}. Is it the same model?"
            )
        return values

    return checked


class _UserCode:
    """Around code of the user's: whatever it raises becomes an AngelForgeError that names it, sys.exit included.

    What it prints goes to standard error: standard output is the report's.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._printed = redirect_stdout(sys.stderr)

    def __enter__(self) -> None:
        self._printed.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._printed.__exit__(kind, error, trace)
        if error is not None and not isinstance(error, AngelForgeError | KeyboardInterrupt):
            raise AngelForgeError(f"{self.what} raised {type(error).__name__}: {error}.") from error


def _traced(reference: Reference) -> Compute:
    """Logits, and the keys and values of every layer [n, 2, kv_heads, head_dim]."""

    def compute(ids: Array) -> dict[str, Array]:
        trace = reference.trace(ids)
        pairs = enumerate(zip(trace.keys, trace.values, strict=True))
        return {"logits": trace.logits, **{f"cache.{i}": np.stack(pair, axis=1) for i, pair in pairs}}

    return compute


def reference_checkpoint(text: str) -> Path | None:
    """The BailingMoeV2 checkpoint that a reference named so is made of; None of other models and of functions."""
    kind, _, rest = text.partition(":")
    config = Path(rest) / "config.json"
    if kind not in ("numpy", "transformers") or not config.is_file():
        return None
    return Path(rest) if checkpoint_config(Path(rest)).get("model_type") in MODEL_TYPES else None


def numpy_reference(checkpoint: Path, bundle: Bundle, keep: int = KEPT) -> Reference:
    """The independent NumPy model on a checkpoint's weights, in f64, as the bundle stretches, rounds, quantises it.

    `keep` as of `Reference`. Raises UsageError where there is no checkpoint.
    """
    if not (checkpoint / "config.json").is_file():
        raise UsageError(f"{checkpoint} has no config.json; the reference needs a checkpoint folder.")
    model = bundle.manifest.model
    stored = checkpoint_config(checkpoint)
    _check_same(stored, model, checkpoint)
    config = {**stored, "num_hidden_layers": model.num_hidden_layers}
    config["rope_scaling"] = config.get("rope_scaling") or rope_keys(model).get("rope_scaling")
    return reference_like(bundle.manifest.precision, config, checkpoint_tensors(checkpoint), keep)


def _check_same(stored: Mapping[str, Any], model: ModelConfig, checkpoint: Path) -> None:
    for name in ("vocab_size", "hidden_size", "num_experts", "intermediate_size", "num_attention_heads"):
        if stored.get(name) != getattr(model, name):
            raise UsageError(
                f"The reference's checkpoint {checkpoint} has {name} {stored.get(name)}, but the bundle has "
                f"{getattr(model, name)}. Name the checkpoint that the bundle was exported from."
            )
    if (stored.get("num_hidden_layers") or 0) < model.num_hidden_layers:
        raise UsageError(
            f"The reference's checkpoint {checkpoint} has {stored.get('num_hidden_layers')} layers, but the bundle has "
            f"{model.num_hidden_layers}. Name the checkpoint that the bundle was exported from."
        )


def reference_like(
    precision: Precision, config: Mapping[str, Any], tensors: Callable[[str], Array], keep: int = KEPT
) -> Reference:
    """The reference on a checkpoint's `tensors` as a bundle of this precision holds them: rounded, quantised."""
    given = tensors if precision is Precision.FP32 else as_packed(tensors, precision.quantized)
    kind = Fp8Reference if precision.quantized else Reference
    return kind(config, given, keep=keep)


def rope_keys(model: ModelConfig) -> dict[str, Any]:
    """What the reference has to know of YaRN that an export added to the checkpoint's configuration."""
    return {} if model.rope_scaling is None else {"rope_scaling": asdict(model.rope_scaling)}


def _function(module: str, name: str) -> Logits:
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` finds modules
    with _UserCode(f"The module {module!r} of --reference"):
        try:
            loaded = import_module(module)
        except ModuleNotFoundError as error:
            raise UsageError(f"--reference names the module {module!r}, but {error.name!r} cannot be found.") from error
        found = getattr(loaded, name, None)
    if found is None:
        raise UsageError(f"The module {module!r} has nothing called {name!r}.")
    if not callable(found):
        raise UsageError(f"{module}:{name} cannot be called; a function from token ids to logits is needed.")

    def logits(ids: Array) -> Array:
        with _UserCode(f"The reference {module}:{name}"):
            return _checked(found(ids), len(ids), f"{module}:{name}")

    return logits


def _checked(logits: Any, tokens: int, name: str) -> Array:
    if hasattr(logits, "detach"):  # a torch tensor
        logits = logits.detach().float().cpu().numpy()
    array = np.asarray(logits)
    array = array[0] if array.ndim == 3 and len(array) == 1 else array
    if array.ndim != 2 or len(array) != tokens:
        raise AngelForgeError(
            f"The reference {name} gave logits of shape {list(array.shape)} for {tokens} ids, expected "
            f"[{tokens}, vocabulary]."
        )
    if array.dtype.kind not in "fiub" and array.dtype.name not in ("bfloat16", "float16"):
        raise AngelForgeError(f"The reference {name} gave values of type {array.dtype}; real numbers are needed.")
    return array


def _transformers(checkpoint: str, bundle: Bundle) -> Compute:
    folder = Path(checkpoint)
    if not (folder / "config.json").is_file():  # transformers would look for the name on the Hub
        raise UsageError(f"{checkpoint} has no config.json; the reference needs a checkpoint folder on this machine.")
    require_transformers()
    kind = checkpoint_config(folder).get("model_type", "")
    if kind in MODEL_TYPES and not knows(kind):
        return as_glm4_moe(numpy_reference(Path(checkpoint), bundle, keep=0))
    logits = native_logits(checkpoint)
    return lambda ids: {"logits": _checked(logits(ids), len(ids), "transformers")}
