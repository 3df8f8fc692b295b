"""`angelforge validate` on the command line: verdict, exit code, report as text, JSON and page."""

import json
import shlex
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from support.built import make_bundle
from support.bundles import wrong_weight
from support.faults import break_engine, swapped_gate_and_up
from support.sources import ROOT

from angelforge.bundle import Bundle
from angelforge.engines.cpu import build_cpu
from angelforge.exporter.export import ExportOptions, export
from angelforge.exporter.synthetic import small_config, write_checkpoint
from angelforge.precision import Precision
from angelforge.runtime.validate import references
from angelforge.tools import validate_bundle, validate_layers
from angelforge.tools.cli import main
from angelforge.tools.toy import DRAFT, MODEL

SIZES = {"num_hidden_layers": 3, "vocab_size": 320}
FEW = ("--random", "1", "--length", "20")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Bundle]:
    """(checkpoint, bundle) in f32, with the CPU engine."""
    return make_bundle(tmp_path_factory.mktemp("validate"), SIZES, ExportOptions(precision=Precision.FP32))


@pytest.fixture
def faulty(model: tuple[Path, Bundle], tmp_path: Path) -> Path:
    """The same bundle whose engine swaps gate and up in layer 2: a build with a bug would leave such files."""
    folder = tmp_path / "bundle"
    shutil.copytree(model[1].folder, folder)
    break_engine(Bundle.open(folder), swapped_gate_and_up)
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["validate", *map(str, arguments)])


def test_a_sound_engine_passes(model: tuple[Path, Bundle]) -> None:
    """With an independent reference, as JSON."""
    checkpoint, bundle = model
    result = run(bundle.folder, *FEW, "--reference", f"numpy:{checkpoint}", "--layer-by-layer", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["ok"] is True
    assert told["first_diverging"] is None
    assert [w["found"] for w in told["whole"]] == ["engine: cpu", "judge: ONNX Runtime on the graph"]
    assert len(told["whole"][1]["by_position"]) == told["whole"][1]["positions"]
    assert {f["place"] for f in told["layers"]} >= {"layer 0", "layer 1", "layer 2"}


class _Page(HTMLParser):
    """What a page loads from elsewhere, and which elements it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.loaded += [value for name, value in attrs if name in ("src", "href")]


def test_a_fault_is_named(faulty: Path, tmp_path: Path) -> None:
    """Exit code 1; the text names layer, operator, shapes and both values; the page needs nothing from elsewhere."""
    page = tmp_path / "report.html"
    result = run(faulty, *FEW, "--html", page)
    assert result.exit_code == 1
    assert "first diverging tensor: layer 2, MoEGateUp" in result.stdout
    assert "expected" in result.stdout
    assert "found" in result.stdout
    assert "FAILED" in result.stdout
    parsed = _Page(page.read_text(encoding="utf-8"))
    assert parsed.loaded == []
    assert parsed.tags.count("svg") >= 2
    assert "layer 2, MoEGateUp" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return np.zeros((len(ids), 320))", "graph differs from the reference"),
        ("return np.full((len(ids), 320), np.nan)", "graph differs from the reference"),
        ("return np.zeros((len(ids), 300))", "vocabulary has 320"),
        ("raise KeyError('mine')", "no_model:logits raised KeyError: 'mine'"),
        ("raise SystemExit(0)", "no_model:logits raised SystemExit: 0"),
        ("return 'hello'", "expected [23, vocabulary]"),
        ("return [['a'] * 320] * len(ids)", "real numbers"),
    ],
)
def test_wrong_references_are_told(
    model: tuple[Path, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, said: str
) -> None:
    """Exit code 1 and a sentence that blames the reference, whatever it does."""
    (tmp_path / "no_model.py").write_text(f"import numpy as np\n\ndef logits(ids):\n    {body}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "no_model", raising=False)
    result = run(model[1].folder, *FEW, "--reference", "no_model:logits")
    assert result.exit_code == 1
    assert said in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_a_reference_that_is_no_python(
    model: tuple[Path, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module with a syntax error is named, too."""
    (tmp_path / "no_python.py").write_text("def (\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    result = run(model[1].folder, *FEW, "--reference", "no_python:logits")
    assert result.exit_code == 1
    assert "raised SyntaxError" in " ".join(result.output.split())


def test_a_reference_that_ends_the_program_does_not_pass(
    model: tuple[Path, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sys.exit(0) of a module would be exit code 0 of a validation that compared nothing."""
    (tmp_path / "no_return.py").write_text("import sys\n\nsys.exit(0)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    result = run(model[1].folder, *FEW, "--reference", "no_return:logits")
    assert result.exit_code == 1
    assert "'no_return' of --reference raised SystemExit: 0" in " ".join(result.output.split())


def test_a_reference_may_be_interrupted() -> None:
    """Ctrl-C is the user's, and no fault of the reference."""
    with pytest.raises(KeyboardInterrupt), references._UserCode("It"):
        raise KeyboardInterrupt


def test_what_a_reference_prints_is_not_in_the_json(
    model: tuple[Path, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At import and in the call; it goes to standard error."""
    (tmp_path / "loud_model.py").write_text(
        "import numpy as np\n\nprint('imported')\n\n"
        "def logits(ids):\n    print('called')\n    return np.zeros((len(ids), 320))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "loud_model", raising=False)
    result = run(model[1].folder, *FEW, "--reference", "loud_model:logits", "--json")
    assert json.loads(result.stdout)["ok"] is False
    assert "imported" in result.stderr
    assert "called" in result.stderr


def next_commands(result: Result) -> list[list[str]]:
    """What a report says that should be typed next."""
    lines = [line for line in result.stdout.splitlines() if line.startswith("next: angelforge ")]
    return [shlex.split(line.removeprefix("next: angelforge ").split("    (")[0]) for line in lines]


def test_a_damaged_weight_of_the_bundle_is_located(model: tuple[Path, Bundle], tmp_path: Path) -> None:
    """Judge and engine read the same file and agree; beside the checkpoint the half layer is named, and what to type.

    The first command finds the damaged file, the second says that the layer's export is sound.
    """
    folder = tmp_path / "bundle"
    shutil.copytree(model[1].folder, folder)
    wrong_weight(Bundle.open(folder), "model.layers.1.attention.dense.weight")
    assert run(folder, *FEW).exit_code == 0
    result = run(folder, *FEW, "--reference", f"numpy:{model[0]}")
    assert result.exit_code == 1
    assert "first diverging tensor: layer 1, attention half" in result.stdout
    verify, alone = next_commands(result)
    found = CliRunner().invoke(main, verify)
    assert found.exit_code == 1
    assert "layer-001" in found.output
    assert alone == ["validate", str(model[0]), "--layers", "1"]
    assert CliRunner().invoke(main, alone).exit_code == 0


def test_a_failing_layer_can_be_run_again(faulty: Path) -> None:
    """The command that a report gives fails at the same place."""
    (again,) = next_commands(run(faulty, *FEW))
    result = CliRunner().invoke(main, [*again, *FEW])
    assert result.exit_code == 1
    assert "first diverging tensor: layer 2, MoEGateUp" in result.stdout


def test_of_a_function_the_suspects_are_named(
    model: tuple[Path, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is known of its weights: what to type has a gap for the checkpoint."""
    (tmp_path / "zero_model.py").write_text(
        "import numpy as np\n\ndef logits(ids):\n    return np.zeros((len(ids), 320))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    result = run(model[1].folder, *FEW, "--reference", "zero_model:logits")
    assert next_commands(result)[1] == ["validate", "CHECKPOINT", "--layers", "0,1"]


def test_only_some_layers(faulty: Path) -> None:
    """The layers before the fault pass by themselves."""
    assert run(faulty, *FEW, "--layers", "0,1").exit_code == 0
    result = run(faulty, *FEW, "--layers", "2", "--json")
    assert result.exit_code == 1
    first = json.loads(result.stdout)["first_diverging"]
    assert (first["place"], first["operator"], first["shape"]) == ("layer 2", "MoEGateUp", [23, 5, 128])
    assert len(first["worst"]) == 3


def test_drafts_are_judged_too(tmp_path: Path) -> None:
    """The toy's draft passes; with gate and up swapped its GateUp is named."""
    bundle = export(str(MODEL), tmp_path / "bundle", ExportOptions(draft=str(DRAFT)))
    build_cpu(bundle)
    assert run(bundle.folder, "--draft", *FEW).exit_code == 0
    break_engine(bundle, swapped_gate_and_up, "draft")
    result = run(bundle.folder, "--draft", *FEW)
    assert result.exit_code == 1
    assert "GateUp: v_draft.midlayer.mlp.GateUp.inner" in result.stdout


def test_precision_study(model: tuple[Path, Bundle], tmp_path: Path) -> None:
    """FP8 beside its own weights in f32, beside the f32 bundle, beside the checkpoint: the last two are the same."""
    checkpoint, bundle = model
    export(str(checkpoint), tmp_path / "fp8", ExportOptions(precision=Precision.FP8))
    told = {}
    for against in ("fp32", str(bundle.folder), str(checkpoint)):
        result = run(tmp_path / "fp8", *FEW, "--against", against, "--json")
        assert result.exit_code == 0, result.output
        told[against] = json.loads(result.stdout)
    own, other, exported = told.values()
    assert other["mean_kl"] == pytest.approx(exported["mean_kl"])
    assert 0 < own["mean_kl"] < 2
    assert [layer["layer"] for layer in own["experts"]] == [1, 2]
    assert all(0.3 < layer["common"] <= 1 for layer in own["experts"])
    page = tmp_path / "study.html"
    assert run(bundle.folder, *FEW, "--against", "fp32", "--html", page).exit_code == 0
    assert "svg" in _Page(page.read_text(encoding="utf-8")).tags


@pytest.mark.full
@pytest.mark.parametrize(
    ("row", "precision", "against"),
    [
        ("bf16", "bf16", str(MODEL)),
        ("fp8", "fp8", str(MODEL)),
        ("fp8, activations alone (`--against fp32`)", "fp8", "fp32"),
    ],
)
def test_the_page_shows_what_the_demos_precisions_cost(tmp_path: Path, row: str, precision: str, against: str) -> None:
    """The table of docs/validation.md is of this toy; another machine's sums may tip a token over."""
    export(str(MODEL), tmp_path / "bundle", ExportOptions(precision=Precision(precision)))
    told = json.loads(run(tmp_path / "bundle", "--dialogues", "--against", against, "--json").stdout)
    page = (ROOT / "docs/validation.md").read_text(encoding="utf-8").split("## What a precision costs")[1]
    cells = next(line for line in page.splitlines() if line.startswith(f"| {row} |")).split(" | ")[1:]
    assert told["mean_kl"] == pytest.approx(float(cells[0]), rel=0.3)
    assert told["perplexity"] == pytest.approx([float(p) for p in cells[2].split(" → ")], rel=1e-3)
    assert told["top1"] == pytest.approx(float(cells[3].removesuffix(" %")) / 100, abs=0.012)
    shown = [float(share) / 100 for share in cells[6].removesuffix(" % |").split(" / ")]
    assert [layer["same_set"] for layer in told["experts"]] == pytest.approx(shown, abs=0.025)


@pytest.mark.parametrize("dtype", ["BF16", "FP8"])
def test_layers_of_a_checkpoint(tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They agree with the independent model; one that believes in another rope base differs in attention alone."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint", small_config(**SIZES), dtype=dtype)
    result = run(checkpoint, "--layers", "2,0", "--json")
    assert result.exit_code == 0, result.output
    halves = json.loads(result.stdout)["layers"]
    assert [(h["layer"], h["half"], h["ok"]) for h in halves] == [
        (2, "attention", True),
        (2, "mlp", True),
        (0, "attention", True),
        (0, "mlp", True),
    ]
    read = validate_layers.checkpoint_config
    monkeypatch.setattr(validate_layers, "checkpoint_config", lambda folder: {**read(folder), "rope_theta": 1e4})
    result = run(checkpoint, "--layers", "1")
    assert result.exit_code == 1
    assert "layer 1, attention at" in result.stdout
    assert "layer 1, mlp at" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--layers", "7"), "layers 0 to 2"),
        (("--layers", "one"), "numbers are needed"),
        (("--layers", "²"), "numbers are needed"),
        (("--layers", "9" * 5000), "numbers are needed"),
        (("--seed", "-1"), "--seed"),
        (("--engine", "h21"), "h21"),
        (("--tokens", "ids.json", "--dialogues"), "--tokens does not go with another"),
        (("--random", "1", "--length", "20", "--against", "nowhere"), "nowhere"),
        (("--reference", "nothing"), "MODULE:FUNCTION"),
        (("--draft",), "has no draft"),
        (("--html", "no/such/folder.html"), "no folder"),
        (("--html", "."), "is a folder"),
        (("--against", "fp32", "--engine", "cpu"), "--engine does not go with --against"),
        (("--against", "fp32", "--layers", "0"), "--layers does not go with --against"),
        (("--against", "fp32", "--reference", "a:b"), "--reference does not go with --against"),
        (("--against", "fp32", "--draft"), "--draft does not go with --against"),
        (("--draft", "--layer-by-layer"), "--layer-by-layer does not go with --draft"),
        (("--draft", "--layers", "0"), "--layers does not go with --draft"),
        (("--dialogues", "--length", "20"), "--length is the length of --random sequences"),
        (("--length", "5000"), "the bundle covers 512 positions"),
    ],
)
def test_wrong_use_is_told(model: tuple[Path, Bundle], arguments: tuple[str, ...], said: str) -> None:
    """Exit code 2 and a sentence."""
    result = run(model[1].folder, *arguments)
    assert result.exit_code == 2, result.output
    assert said in result.output


@pytest.mark.parametrize(
    "arguments",
    [
        ("--engine", "cpu"),
        ("--reference", "a:b"),
        ("--against", "fp32"),
        ("--layer-by-layer",),
        ("--operator-by-operator",),
        ("--draft",),
        ("--dialogues",),
        ("--random", "1"),
        ("--chunk", "3"),
        ("--padding", "0"),
        ("--html", "page.html"),
        ("--length", "65"),
    ],
)
def test_what_means_nothing_for_a_checkpoint_is_refused(model: tuple[Path, Bundle], arguments: tuple[str, ...]) -> None:
    """Exit code 2, and the option is named."""
    result = run(model[0], "--layers", "0", *arguments)
    assert result.exit_code == 2, result.output
    assert f"{arguments[0]} is " in result.output


@pytest.mark.parametrize(
    "reference", ["no_such_module:f", "json:nothing", "numpy:nowhere", "transformers:nowhere", "numpy:other"]
)
def test_references_are_loaded_first(
    model: tuple[Path, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: str
) -> None:
    """What is named and cannot be had is told before anything is computed."""
    write_checkpoint(tmp_path / "other", small_config(**{**SIZES, "hidden_size": 512, "num_attention_heads": 16}))
    monkeypatch.setattr(validate_bundle, "compare_whole", lambda *_: pytest.fail("something was computed"))
    result = run(model[1].folder, *FEW, "--reference", reference.replace("other", str(tmp_path / "other")))
    assert result.exit_code == 2, result.output


def test_a_checkpoint_needs_layers(model: tuple[Path, Bundle]) -> None:
    result = run(model[0])
    assert result.exit_code == 2
    assert "--layers" in result.output
    result = run(model[0], "--layers", "9")
    assert result.exit_code == 2
    assert "layers 0 to 2" in result.output
