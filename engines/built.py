"""What engines that have been built say of their memory."""

from collections.abc import Mapping
from typing import Any

from angelforge.bundle import Bundle
from angelforge.engines.manifest import MANIFESTS, EngineManifest, engine_folder, graph_facts
from angelforge.errors import AngelForgeError
from angelforge.targets import Target

_SIZES = ("max_tokens", "max_batch", "draft_depth", "tensor_parallel")


def built_activations(bundle: Bundle, target: Target, options: Mapping[str, Any]) -> int | None:
    """Bytes of activations that TensorRT told of the bundle's engines for `target`, target and draft together.

    None without engines of the bundle's graphs and of these sizes.
    """
    ranks = options["tensor_parallel"]
    total = 0
    for role in (role for role in MANIFESTS if role in bundle.manifest.graphs):
        try:
            manifest = EngineManifest.load(engine_folder(bundle, target.name, ranks), MANIFESTS[role])
            facts = graph_facts(bundle, role, ranks)
        except AngelForgeError:  # not built, or not readable: loading it says so
            return None
        if not manifest.activation_bytes or any(getattr(manifest, name) != fact for name, fact in facts.items()):
            return None
        if any(manifest.options.get(name) != options[name] for name in _SIZES):
            return None
        total += max(manifest.activation_bytes)
    return total or None
