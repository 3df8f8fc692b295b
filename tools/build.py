"""`angelforge build`: a bundle's engine for a target."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from angelforge.bundle import Bundle
from angelforge.errors import UsageError
from angelforge.targets import TARGETS, Target, get_target
from angelforge.tools.options import bundle_argument, json_option
from angelforge.tools.output import format_bytes, format_seconds, print_json, total_progress

if TYPE_CHECKING:
    from angelforge.engines.limits import BuildOptions
    from angelforge.engines.manifest import EngineManifest


@click.command()
@bundle_argument
@click.option("--target", type=click.Choice(list(TARGETS)), default="cpu", show_default=True, help="What to build for.")
@click.option("--max-tokens", type=int, help="Tokens in one step.  [default: 8192]")
@click.option("--max-batch", type=int, help="Sequences in one step.  [default: 32]")
@click.option("--draft-depth", type=int, help="Draft tokens verified for each sequence.  [default: 3 with a draft]")
@click.option("--pages", type=int, help="Pages of the KV cache.  [default: what memory the plan leaves]")
@click.option("--tensor-parallel", type=int, help="Devices that share the model.  [default: 1]")
@click.option("--optimization-level", type=int, help="TensorRT's builder level, 0 to 5.  [default: TensorRT's own]")
@click.option(
    "--plugins", type=click.Choice(["aot", "python"]), help="TensorRT 11: kernels in the engine, or in Python."
)
@click.option("--preflight", is_flag=True, help="Only prove, on any machine, that the bundle builds for the target.")
@json_option
def build(bundle: Path, target: str, preflight: bool, as_json: bool, **sizes: Any) -> None:
    """Build a bundle's engine for a target. No weight is read: they may still be packed meanwhile.

    TensorRT's engines (h20, h100, h200) are built on the GPU that they are for, those of TensorRT for RTX, the CPU's
    and ONNX Runtime's for any GPU (cuda) on any machine. An interrupted build leaves the last engine as it was.

    \b
    Example:
      angelforge build bundle --target cpu
      angelforge build bundle --target h20 --preflight
    """
    given = {name: value for name, value in sizes.items() if value is not None}
    row = get_target(target)
    opened = Bundle.open(bundle)
    ranks = given.get("tensor_parallel", 1)
    row.check_ranks(ranks)
    opened = _with_graph(opened, ranks)
    if row.backend == "onnxruntime":
        useless = [name for name in (*given, *["preflight"] * preflight) if name != "tensor_parallel"]
        if useless:
            options = ", ".join(f"--{name.replace('_', '-')}" for name in useless)
            raise UsageError(f"{options}: of no use for target {target}, which is built for any sizes on any machine.")
        from angelforge.engines.cpu import build_onnxruntime

        _tell(opened, build_onnxruntime(opened, target, ranks), as_json)
        return
    from angelforge.engines.limits import BuildOptions

    chosen = BuildOptions(**given)
    _announce(opened, row, chosen)
    if preflight:
        _preflight(opened, row, chosen, as_json)
    else:
        _build(opened, row, chosen, as_json)


def _with_graph(bundle: Bundle, ranks: int) -> Bundle:
    """The bundle with a graph for so many ranks, which is made of its configuration where it is not there yet."""
    if ranks == 1:
        return bundle
    from angelforge.exporter.rank_graph import add_rank_graph

    return add_rank_graph(bundle, ranks)


def _announce(bundle: Bundle, target: Target, options: BuildOptions) -> None:
    """What the planner says, before work begins."""
    from angelforge.engines.limits import plan_build

    plan = plan_build(bundle, target, options)
    cache = f"a cache of {plan.tokens:,} tokens" if plan.fits else f"not fitting: {plan.problem}"
    click.echo(
        f"plan for {target.name}: weights {format_bytes(plan.weights_per_rank)}, activations up to "
        f"{format_bytes(plan.reserve_activations)}, of {format_bytes(plan.memory)}; {cache}",
        err=True,
    )


def _build(bundle: Bundle, target: Target, options: BuildOptions, as_json: bool) -> None:
    from angelforge.engines.build import build_tensorrt
    from angelforge.engines.built import copied_pool

    with total_progress(f"building for {target.name}", "%") as progress:
        manifest = build_tensorrt(bundle, target, options, lambda phase, share: progress(round(100 * share), 100))
    _tell(bundle, manifest, as_json)
    if found := copied_pool(bundle, manifest):
        click.echo(
            f"warning: TensorRT reserves {format_bytes(found[0])} for the activations of a few tokens, as if it copied "
            f"the KV cache, of which a layer has {format_bytes(found[1])}: steps would be slow. Try --plugins python, "
            "and please report this with the build log.",
            err=True,
        )


def _preflight(bundle: Bundle, target: Target, options: BuildOptions, as_json: bool) -> None:
    from angelforge.engines.preflight import preflight

    with total_progress(f"checking for {target.name}", "%") as progress:
        found = preflight(bundle, target, options, lambda phase, share: progress(round(100 * share), 100))
    if as_json:
        print_json(found.to_dict())
        return
    click.echo(found.verdict)
    click.echo(
        f"{found.plugins} plugins, {found.weights} weights as inputs, {len(found.profiles)} profiles; "
        f"engine {format_bytes(found.engine_bytes)}, {format_seconds(found.seconds)}"
    )
    if found.problem is not None:
        click.echo(f"warning: it would not fit on {target.name}.", err=True)


def _tell(bundle: Bundle, manifest: EngineManifest, as_json: bool) -> None:
    from angelforge.engines.manifest import engine_folder

    engine = engine_folder(bundle, manifest.target, manifest.tensor_parallel) / manifest.engine
    if as_json:
        print_json({"engine": str(engine), "seconds": manifest.seconds, "target": manifest.target} | _facts(manifest))
        return
    size = f", {format_bytes(manifest.engine_bytes)}" if manifest.engine_bytes else ""
    click.echo(f"{engine}: built for {manifest.target} in {format_seconds(manifest.seconds)}{size}")
    for profile in manifest.profiles:
        click.echo(
            f"  {profile['name']}: up to {profile['tokens']['most']:,} tokens of {profile['batch']['most']} sequences, "
            f"tuned for {profile['tokens']['tuned']:,}"
        )
    ranks = manifest.tensor_parallel
    start = f"torchrun --standalone --nproc-per-node {ranks} --no-python " if ranks > 1 else ""
    shared = f" --tensor-parallel {ranks}" if ranks > 1 else ""
    click.echo(f'Next: {start}angelforge run {bundle.folder} --target {manifest.target}{shared} --prompt "…"')


def _facts(manifest: EngineManifest) -> dict[str, Any]:
    return {
        "backend": manifest.backend,
        "backend_version": manifest.backend_version,
        "engine_bytes": manifest.engine_bytes,
        "profiles": list(manifest.profiles),
    }
