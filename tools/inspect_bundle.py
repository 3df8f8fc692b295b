"""What `inspect` tells about a bundle: manifest, graphs, weights, engines."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from angelforge.bundle import Bundle
from angelforge.engines.manifest import FILE as ENGINE_FILE
from angelforge.engines.manifest import EngineManifest
from angelforge.tools.graph_summary import GraphSummary, summarize_graph
from angelforge.tools.inspect_graph import print_graph
from angelforge.tools.output import format_bytes, format_seconds, print_table, total_progress


@dataclass(frozen=True)
class BundleReport:
    """An opened bundle, its graphs by role, its engines by target; `verified` if every byte was compared."""

    bundle: Bundle
    graphs: dict[str, GraphSummary]
    engines: dict[str, EngineManifest]
    verified: bool

    @classmethod
    def read(cls, folder: Path, verify: bool) -> "BundleReport":
        """Open a bundle; with `verify` compare the digests of all its files. Raises as `Bundle` does."""
        bundle = Bundle.open(folder)
        if verify:
            with total_progress("verifying") as report:
                bundle.verify(report)
        graphs = {role: summarize_graph(folder / name) for role, name in bundle.manifest.graphs.items()}
        built = sorted(file.parent for file in folder.glob(f"engines/*/{ENGINE_FILE}"))
        return cls(bundle, graphs, {place.name: EngineManifest.load(place) for place in built}, verify)

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {
            "kind": "bundle",
            "path": str(self.bundle.folder),
            "verified": self.verified,
            "manifest": json.loads(self.bundle.manifest.to_json()),
            "tensors": len(self.bundle.tensors),
            "graphs": {role: graph.to_dict() for role, graph in self.graphs.items()},
            "engines": {target: asdict(engine) for target, engine in self.engines.items()},
        }

    def show(self) -> None:
        """Print it for people."""
        manifest = self.bundle.manifest
        model, rope = manifest.model, manifest.rope
        size = sum(record.size for record in manifest.files.values())
        checked = "every byte verified" if self.verified else "names, sizes and headers checked"
        click.echo(f"{self.bundle.folder}: bundle of {format_bytes(size)}, {checked}")
        facts = [
            ["written by", manifest.producer],
            ["model", f"{model.num_hidden_layers} layers, hidden {model.hidden_size}, vocabulary {model.vocab_size}"],
            [
                "experts",
                f"{model.num_experts}, {model.num_experts_per_tok} per token, {model.num_shared_experts} shared",
            ],
            ["precision", manifest.precision.value],
            ["context", f"{manifest.max_context:,} positions, YaRN factor {rope['factor']:g}"],
            ["KV pool", f"pages of {manifest.page_size} tokens"],
            ["weights", f"{len(self.bundle.tensors):,} tensors" if self.bundle.weights_present else "absent"],
            ["digest", manifest.model_digest],
        ]
        if manifest.draft is not None:
            draft, layers = manifest.draft, ", ".join(map(str, manifest.draft.capture_layers))
            told = f"{draft.draft_vocab_size} tokens, states after layers {layers} of the model"
            facts.append(["draft", f"{told}, in {manifest.precision.value}"])
        print_table(["fact", ""], facts)
        print_table(
            ["file", "bytes", "sha256"],
            [[name, format_bytes(record.size), record.sha256[:12]] for name, record in manifest.files.items()],
        )
        for role, graph in self.graphs.items():
            print_graph(f"graph {role}", graph)
        engines = [
            [target, f"{engine.backend} {engine.backend_version}", engine.precision, format_seconds(engine.seconds)]
            for target, engine in self.engines.items()
        ]
        if engines:
            print_table(["engine", "built with", "precision", "in"], engines)
        else:
            click.echo(f"No engine yet. Next: angelforge build {self.bundle.folder} --target cpu")
