"""A page about a bundle: its graph's structure and what it takes of each target's memory, as one HTML file."""

from collections.abc import Iterable, Mapping
from html import escape
from itertools import groupby
from pathlib import Path

import onnx_ir as ir

from angelforge.bundle import Bundle
from angelforge.engines.activations import live_memory
from angelforge.engines.limits import BuildOptions, plan_build
from angelforge.engines.manifest import EngineManifest
from angelforge.engines.network import prepare_network
from angelforge.engines.planner import Plan
from angelforge.engines.profiles import Profile
from angelforge.targets import TARGETS
from angelforge.tools.output import format_bytes
from angelforge.tools.svg import Part, area, chain, legend, stacked_bar

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:960px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse}td,th{padding:2px 12px 2px 0;text-align:left}th{border-bottom:1px solid #999}
.chain{display:flex;flex-wrap:wrap;align-items:center;gap:4px}.chain>span{color:#888}
.box{border:1px solid #4e79a7;border-radius:4px;padding:2px 8px;background:#f2f6fa}.box small{display:block;color:#555}
.legend span{margin-right:1.2em;display:inline-block}
.legend i{display:inline-block;width:.9em;height:.9em;margin-right:.3em}
"""

Step = tuple[str, str]  # operator, shape of its first output


def bundle_page(bundle: Bundle, engines: Mapping[str, EngineManifest]) -> str:
    """The page of an opened bundle and its engines by target."""
    model = ir.load(bundle.folder / bundle.manifest.graphs["target"])
    prepare_network(model)
    manifest = bundle.manifest
    title = f"{bundle.folder.name}: {manifest.model.num_hidden_layers} layers in {manifest.precision.value}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        "<h2>Structure</h2>",
        *_structure(model),
        *_draft(bundle),
        "<h2>Memory</h2>",
        *_memory(bundle),
        *(line for target, engine in engines.items() for line in _engine(model, target, engine)),
    ]
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def structure(model: ir.Model) -> list[tuple[str, tuple[Step, ...]]]:
    """The graph as named chains of operators; neighbouring layers of the same chain are one entry."""
    chains = [
        (place, tuple((node.op_type, _shape(node)) for node in nodes))
        for place, nodes in groupby(model.graph, key=lambda node: _place(node.name or ""))
    ]
    found = []
    for steps, group in groupby(chains, key=lambda chain: chain[1]):
        places = [place for place, _ in group]
        found.append((places[0] if places[0] == places[-1] else f"{places[0]} … {places[-1]}", steps))
    return found


def _structure(model: ir.Model) -> Iterable[str]:
    for place, steps in structure(model):
        yield f"<h3>{escape(place)}</h3>"
        yield chain(steps)


def _draft(bundle: Bundle) -> Iterable[str]:
    name = bundle.manifest.graphs.get("draft")
    if name is not None:
        model = ir.load(bundle.folder / name)
        prepare_network(model)
        yield "<h2>Structure of the draft</h2>"
        yield from _structure(model)


def _place(name: str) -> str:
    """`layer 3` for a node of model.layers.3, else the module below the model; nodes of no module stand together."""
    parts = name.split("/")
    if len(parts) == 1 or (len(parts) == 2 and parts[0] == "model"):  # the Gathers, which stand in no module
        return "rows that want logits"
    layer = next((part for part in parts if part.startswith("layers.")), None)
    return f"layer {layer.removeprefix('layers.')}" if layer else parts[1] if parts[0] == "model" else parts[0]


def _shape(node: ir.Node) -> str:
    shape = node.outputs[0].shape
    return "×".join(str(d) if isinstance(d, int) else str(d.value) for d in shape) if shape is not None else ""


def _memory(bundle: Bundle) -> Iterable[str]:
    plans = [plan_build(bundle, target, BuildOptions()) for target in TARGETS.values() if target.memory_bytes]
    yield legend([part.name for part in _parts(plans[0])])
    for plan in plans:
        fit = "fits" if plan.fits else f"does not fit: {plan.problem}"
        yield f"<p><b>{escape(plan.target)}</b>, {format_bytes(plan.memory)}: {escape(fit)}<br>"
        yield f"{stacked_bar(_parts(plan), plan.memory)}</p>"


def _parts(plan: Plan) -> list[Part]:
    """Weights by kind, the small kinds together; reserves; what is left for the cache."""
    large = [weight for weight in plan.weights if weight.per_rank >= plan.weights_per_rank / 100]
    rest = plan.weights_per_rank - sum(weight.per_rank for weight in large)
    amounts = [
        *((weight.kind.value, weight.per_rank) for weight in large),
        ("other weights", rest),
        ("activations", plan.reserve_activations),
        ("driver and engine", plan.reserve_device),
        ("KV cache", max(plan.left, 0)),
    ]
    return [Part(name, amount, format_bytes(amount)) for name, amount in amounts]


def _engine(model: ir.Model, target: str, engine: EngineManifest) -> Iterable[str]:
    yield f"<h2>Engine for {escape(target)}</h2>"
    yield f"<p>{escape(engine.backend)} {escape(engine.backend_version)}, {format_bytes(engine.engine_bytes)}</p>"
    for i, raw in enumerate(engine.profiles):
        profile = Profile.from_dict(raw)
        live = live_memory(model, {symbol: sizes.most for symbol, sizes in profile.symbols().items()})
        told = format_bytes(engine.activation_bytes[i]) if i < len(engine.activation_bytes) else "not told"
        yield (
            f"<p><b>{escape(profile.name)}</b>: up to {profile.tokens.most:,} tokens; activations at most "
            f"{format_bytes(live.peak)} at {escape(live.peak_node)} (TensorRT reserves {told})<br>"
            f"{area(live.nbytes)}</p>"
        )


def write_page(bundle: Bundle, engines: Mapping[str, EngineManifest], file: Path) -> None:
    """Writes the page. Raises AngelForgeError where the file cannot be written."""
    from angelforge.atomic import write_atomic

    write_atomic(file, bundle_page(bundle, engines))
