"""`angelforge validate BUNDLE --against …`: what bf16 and FP8 cost, on the same tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from angelforge.bundle import FILE, Bundle
from angelforge.errors import UsageError
from angelforge.precision import Precision
from angelforge.runtime.validate.dequantized import dequantized_graph
from angelforge.runtime.validate.operations import judge_graph, prepare_judge
from angelforge.runtime.validate.study import Side, Study, study
from angelforge.tools.validate_data import DataOptions, make_schedule


def run_study(subject: Path, against: str, data: DataOptions, report: Callable[[int, int], None]) -> Study:
    """The bundle as its precision stores values, beside what `against` names.

    "fp32" is the bundle's own weights with nothing rounded on the way; another bundle is run in its own precision; of
    a checkpoint the same layers are exported in fp32 to a temporary folder.

    Raises:
        UsageError: `against` is none of these, or another model.
        AngelForgeError: a side cannot be run.
    """
    bundle = Bundle.open(subject)
    bundle.require_weights()
    planned, told = make_schedule(bundle, data)
    found = _as_stored(bundle)
    if against == "fp32":
        return study(_exact(bundle), found, planned, told, report)
    other = Path(against)
    if (other / FILE).is_file():
        opened = Bundle.open(other)
        opened.require_weights()
        _check_same(bundle, opened)
        return study(_as_stored(opened), found, planned, told, report)
    if not (other / "config.json").is_file():
        raise UsageError(f"--against is {against!r}, but fp32, a bundle or a checkpoint folder is needed.")
    with TemporaryDirectory(prefix="angelforge-fp32-") as folder:
        opened = _export(other, bundle, Path(folder) / "bundle")
        _check_same(bundle, opened)
        return study(_as_stored(opened, f"{against} in fp32"), found, planned, told, report)


def _as_stored(bundle: Bundle, name: str | None = None) -> Side:
    told = name or f"{bundle.folder} as {bundle.manifest.precision.value} stores it"
    return Side(told, bundle, judge_graph(bundle, as_stored=bundle.manifest.precision is not Precision.FP32))


def _exact(bundle: Bundle) -> Side:
    """The stored weights, computed in f32."""
    name = f"the same weights computed in f32 ({bundle.folder})"
    if bundle.manifest.precision.quantized:
        return Side(name, bundle, prepare_judge(dequantized_graph(bundle)))
    return Side(name, bundle, judge_graph(bundle))


def _export(checkpoint: Path, like: Bundle, folder: Path) -> Bundle:
    from angelforge.config import ModelConfig
    from angelforge.exporter.export import ExportOptions, export

    scaling = like.manifest.model.rope_scaling
    own = ModelConfig.load(checkpoint).rope_scaling
    options = ExportOptions(
        precision=Precision.FP32,
        rope_scaling=None if scaling is None or own is not None else f"yarn:{scaling.factor:g}",
        max_context=like.manifest.max_context,
        layers=like.manifest.model.num_hidden_layers,
    )
    return export(str(checkpoint), folder, options)


def _check_same(left: Bundle, right: Bundle) -> None:
    for name in ("vocab_size", "num_hidden_layers", "hidden_size", "num_experts"):
        a, b = getattr(left.manifest.model, name), getattr(right.manifest.model, name)
        if a != b:
            raise UsageError(
                f"The two models have {name} {a} and {b}; a study needs two precisions of one model, with the same "
                "--layers."
            )
    if left.manifest.page_size != right.manifest.page_size:
        raise UsageError("The two bundles have pages of different sizes; export both with this version.")
