"""What `inspect` tells about an engine: its manifest, profiles and layers, also on a machine that cannot load it."""

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from angelforge.bundle import Bundle
from angelforge.engines.manifest import EngineManifest, file_digest
from angelforge.engines.profiles import Profile
from angelforge.engines.tensorrt_layers import LOGS, EngineLayer, read_layers
from angelforge.tools.graph_summary import GraphSummary, summarize_graph
from angelforge.tools.inspect_graph import print_ports
from angelforge.tools.output import format_bytes, format_seconds, print_table


@dataclass(frozen=True)
class EngineReport:
    """An engine's folder; `layers` as TensorRT listed them in the build's log, empty where it did not.

    `graph` is the engine itself for ONNX Runtime, else what it was built from, where the bundle around it still has
    that: inputs and outputs are the engine's, and the graph's initializers are inputs of TensorRT's engines.
    """

    folder: Path
    manifest: EngineManifest
    layers: tuple[EngineLayer, ...]
    verified: bool
    graph: GraphSummary | None = None

    @classmethod
    def read(cls, folder: Path, verify: bool) -> "EngineReport":
        """Reads manifest and log; with `verify` compares the engine's size and digest. Raises as `EngineManifest`."""
        manifest = EngineManifest.load(folder)
        if verify:
            engine = folder / manifest.engine
            manifest.require({"engine_digest": file_digest(engine)})
        log = folder / LOGS["target"]
        layers = tuple(read_layers(log)) if manifest.profiles and log.is_file() else ()
        return cls(folder, manifest, layers, verify, _graph(folder, manifest))

    @property
    def bundle(self) -> Bundle:
        """The bundle around the engine. Raises AngelForgeError where there is none."""
        return Bundle.open(_bundle_folder(self.folder))

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {
            "kind": "engine",
            "path": str(self.folder),
            "verified": self.verified,
            "manifest": asdict(self.manifest),
            "graph": None if self.graph is None else self.graph.to_dict(),
            "layers": [asdict(layer) for layer in self.layers],
        }

    def show(self) -> None:
        """Print it for people."""
        manifest = self.manifest
        checked = "digest verified" if self.verified else "not verified"
        click.echo(f"{self.folder / manifest.engine}: engine for {manifest.target}, {checked}")
        print_table(["fact", ""], [[name, text] for name, text in _facts(manifest).items()])
        if self.graph is not None:
            print_ports(self.graph)
            if manifest.backend != "onnxruntime":
                click.echo(f"and {self.graph.initializers:,} weights as inputs, by their names in the weight files")
        print_table(["operator", "version", "kernel"], _operators(manifest))
        if manifest.profiles:
            print_table(
                ["profile", "tokens", "tuned for", "sequences", "logits", "pages", "activations"], _rows(manifest)
            )
        if self.layers:
            kinds = Counter((layer.profile, layer.kind) for layer in self.layers)
            rows = [[str(profile), kind, str(count)] for (profile, kind), count in sorted(kinds.items())]
            print_table(["profile", "TensorRT's kind of layer", "layers"], rows)


def _bundle_folder(engine: Path) -> Path:
    return engine.resolve().parent.parent


def _graph(folder: Path, manifest: EngineManifest) -> GraphSummary | None:
    engine = folder / manifest.engine
    if engine.suffix == ".onnx" and engine.is_file():
        return summarize_graph(engine)
    for file in sorted(_bundle_folder(folder).glob("*.onnx")):
        if file_digest(file) == manifest.graph_digest:
            return summarize_graph(file)
    return None


def _facts(manifest: EngineManifest) -> dict[str, str]:
    where = manifest.architecture if manifest.gpu is None else f"{manifest.architecture}, on {manifest.gpu} only"
    facts = {
        "built with": f"{manifest.backend} {manifest.backend_version}",
        "runs on": where,
        "driver": manifest.driver,
        "bytes": format_bytes(manifest.engine_bytes) if manifest.engine_bytes else None,
        "precision": manifest.precision,
        "context": f"{manifest.max_context:,} positions, pages of {manifest.page_size} tokens",
        "ranks": str(manifest.tensor_parallel),
        "built": f"{manifest.built_at} in {format_seconds(manifest.seconds)}".strip(),
        "options": ", ".join(f"{key} {value}" for key, value in manifest.options.items()),
        "model": manifest.model_digest[:12],
        "graph": manifest.graph_digest[:12],
        "draft": manifest.draft_digest[:12] if manifest.draft_digest else None,
    }
    return {name: text for name, text in facts.items() if text}


def _operators(manifest: EngineManifest) -> list[list[str]]:
    return [[name, str(version), manifest.kernels.get(name, "")[:12]] for name, version in manifest.operators.items()]


def _rows(manifest: EngineManifest) -> list[list[str]]:
    found = []
    for i, raw in enumerate(manifest.profiles):
        profile = Profile.from_dict(raw)
        told = manifest.activation_bytes[i] if i < len(manifest.activation_bytes) else None
        sizes = (profile.batch.most, profile.logit_rows.most, profile.pages.most)
        row = [profile.name, f"≤ {profile.tokens.most:,}", f"{profile.tokens.tuned:,}", *(f"{n:,}" for n in sizes)]
        found.append([*row, "" if told is None else format_bytes(told)])
    return found
