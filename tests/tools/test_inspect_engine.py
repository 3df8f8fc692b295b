"""`inspect` of TensorRT engines, and the page that draws a bundle."""

import json
from html.parser import HTMLParser
from pathlib import Path

import onnx_ir as ir
import pytest
from click.testing import CliRunner, Result
from support.tensorrt import graph_bundle, quiet, rtx

from angelforge.bundle import Bundle
from angelforge.engines.activations import live_memory
from angelforge.engines.build import build_tensorrt
from angelforge.engines.limits import BuildOptions
from angelforge.engines.manifest import EngineManifest
from angelforge.engines.network import prepare_network
from angelforge.engines.preparation import prepare_build
from angelforge.precision import Precision
from angelforge.targets import get_target
from angelforge.tools.cli import main
from angelforge.tools.inspect_page import structure
from angelforge.tools.svg import Part, area, stacked_bar

TARGET = get_target("rtx4090")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    rtx()
    made = graph_bundle(tmp_path_factory.mktemp("inspect"), Precision.FP8)
    build_tensorrt(made, TARGET, BuildOptions(max_tokens=512, max_batch=4), quiet)
    return made


def inspect(*args: object) -> Result:
    return CliRunner().invoke(main, ["inspect", *map(str, args)])


def folder(bundle: Bundle) -> Path:
    return bundle.folder / "engines" / TARGET.name


def test_an_engine_is_told(bundle: Bundle) -> None:
    """Manifest, profiles with TensorRT's activations, operators, and the layers of every profile."""
    report = json.loads(inspect(folder(bundle), "--json").stdout)
    assert (report["kind"], report["manifest"]["target"]) == ("engine", "rtx4090")
    assert {layer["profile"] for layer in report["layers"]} == {0, 1, 2, 3}
    text = inspect(folder(bundle)).stdout
    for word in ("tensorrt-rtx", "sm_89", "decode-8", "prefill", "custom_layer", "Fp8MoEGateUp", "not verified"):
        assert word in text


def test_verify_sees_a_changed_engine(bundle: Bundle) -> None:
    """With --verify the engine's digest is compared, and a flipped bit is told."""
    assert "digest verified" in inspect(folder(bundle), "--verify").stdout
    engine = next(folder(bundle).glob("*.engine"))
    kept = engine.read_bytes()
    engine.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    result = inspect(folder(bundle), "--verify")
    engine.write_bytes(kept)
    assert result.exit_code == 1
    assert "is not the file that was built" in result.stderr


class Tags(HTMLParser):
    """Checks that tags close in order, and collects the text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in ("meta", "br", "rect", "line", "polygon", "p"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("rect", "line", "polygon", "p"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_draws_structure_and_memory(bundle: Bundle, tmp_path: Path) -> None:
    """One file without references to others: layers as chains, a bar for each target, an area for each profile."""
    page = tmp_path / "page.html"
    assert inspect(bundle.folder, "--html", page).exit_code == 0
    html = page.read_text()
    tags = Tags()
    tags.feed(html)
    assert tags.open == []
    assert "layer 1 … layer 3" in tags.text
    for word in ("Fp8MoEGateUp", "PagedAttention", "h20", "h200", "routed experts", "Engine for rtx4090", "decode-256"):
        assert word in html
    assert not any(link in html for link in ("http", "src=", "href=", "<script"))
    assert html.count("<polygon") == 4


def test_an_engine_has_the_page_of_its_bundle(bundle: Bundle, tmp_path: Path) -> None:
    """Structure and memory of what it was built from; other files have no page."""
    result = inspect(folder(bundle), "--html", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    html = (tmp_path / "page.html").read_text()
    assert "Fp8MoEGateUp" in html and "Engine for rtx4090" in html
    result = inspect(bundle.folder / "model.onnx", "--html", tmp_path / "other.html")
    assert (result.exit_code, "is no bundle or engine" in result.stderr) == (2, True)


def test_inputs_and_outputs_are_told(bundle: Bundle) -> None:
    """The contract's inputs, the pool, the logits, and how many weights are inputs."""
    report = json.loads(inspect(folder(bundle), "--json").stdout)
    names = [port["name"] for port in report["graph"]["inputs"]]
    assert names[:2] == ["input_ids", "positions"] and "kv_cache.3" in names
    assert report["graph"]["outputs"][0] == {"name": "logits", "dtype": "float", "shape": ["R", 1024]}
    text = inspect(folder(bundle)).stdout
    assert "kv_cache.0 … kv_cache.3" in text
    assert f"{report['graph']['initializers']:,} weights as inputs" in text


def test_structure_folds_equal_layers(bundle: Bundle) -> None:
    """Dense and expert layers are told apart; equal neighbours are one chain, in the graph's order."""
    model = ir.load(bundle.folder / "model.onnx")
    prepare_network(model)
    found = structure(model)
    assert [place for place, _ in found][:3] == ["word_embeddings", "layer 0", "layer 1 … layer 3"]
    layers = dict(found)
    assert "Fp8GateUp" in [name for name, _ in layers["layer 0"]]
    assert len(layers["layer 1 … layer 3"]) == 12


def test_live_memory_is_near_tensorrts(bundle: Bundle) -> None:
    """What is computed from the graph alone is what TensorRT reserves, but for what it cannot share."""
    prepared = prepare_build(bundle, TARGET, BuildOptions(max_tokens=512, max_batch=4))
    told = EngineManifest.load(folder(bundle)).activation_bytes
    for profile, reserved in zip(prepared.profiles, told, strict=True):
        live = live_memory(prepared.target.model, {k: sizes.most for k, sizes in profile.symbols().items()})
        assert live.peak <= reserved <= 2 * live.peak
        assert live.peak_node in live.nodes


def test_bars_keep_to_their_scale() -> None:
    """Parts add up to the width; what exceeds the limit pushes the mark to the left."""
    drawn = stacked_bar([Part("a", 30, "30 B"), Part("b & c", 10, "10 B")], limit=80, width=800)
    assert 'width="300.0"' in drawn
    assert 'x1="800.0"' in drawn
    assert "b &amp; c: 10 B" in drawn
    assert 'x1="200.0"' in stacked_bar([Part("a", 160, "")], limit=40, width=800)
    assert area([]).count("polygon") == 1
