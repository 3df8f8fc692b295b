"""What engines that have been built say of their memory."""

from collections.abc import Mapping
from typing import Any

from angelforge.bundle import Bundle
from angelforge.engines.footprint import kv_bytes_per_token
from angelforge.engines.manifest import MANIFESTS, EngineManifest, engine_folder, graph_facts
from angelforge.errors import AngelForgeError
from angelforge.targets import Target

_NOTICED = 256 << 20  # bytes: copies of less take no time to speak of
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


def copied_pool(bundle: Bundle, manifest: EngineManifest) -> tuple[int, int] | None:
    """(activations of the smallest profile, one layer's pool), in bytes, where the first have room for the second.

    TensorRT may copy the memory that a plugin writes in place (its documentation of `get_aliased_input` says so); what
    that takes in each step is more than a step. A few tokens by themselves need a quarter of it (the 103B model in
    TensorRT for RTX). None where it does not, did not tell, or where it would not matter.
    """
    if not manifest.activation_bytes or not manifest.profiles:
        return None
    model, kind = bundle.manifest.model, bundle.manifest.precision.activation
    page = kv_bytes_per_token(model, kind) * bundle.manifest.page_size // model.num_hidden_layers
    layer = manifest.profiles[0]["pages"]["most"] * page // manifest.tensor_parallel
    smallest = manifest.activation_bytes[0]
    return (smallest, layer) if smallest >= layer >= _NOTICED else None
