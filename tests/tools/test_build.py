"""`angelforge build` for TensorRT targets: text, JSON, and what is refused."""

import dataclasses
import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from support.tensorrt import graph_bundle, rtx

from angelforge.bundle import Bundle
from angelforge.engines import build as building
from angelforge.engines.built import copied_pool
from angelforge.engines.manifest import EngineManifest, engine_folder
from angelforge.tools.cli import main


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return graph_bundle(tmp_path_factory.mktemp("build")).folder


def build(*args: object) -> Result:
    return CliRunner().invoke(main, ["build", *map(str, args)])


def test_an_engine_is_told_with_its_profiles(bundle: Path) -> None:
    rtx()
    result = build(bundle, "--target", "rtx4090", "--max-tokens", 16, "--max-batch", 2)
    assert result.exit_code == 0, result.output
    assert "built for rtx4090 in" in result.stdout
    assert "decode-8: up to 8 tokens of 2 sequences, tuned for 1" in result.stdout
    assert "prefill: up to 16 tokens of 2 sequences, tuned for 16" in result.stdout


def test_a_copied_pool_is_told(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few tokens that need the memory of a whole layer's pool; as it is built, the pool is written in place."""
    rtx()
    arguments = (bundle, "--target", "rtx4090", "--max-tokens", 16, "--max-batch", 2)
    assert "warning" not in build(*arguments).stderr
    manifest = EngineManifest.load(engine_folder(Bundle.open(bundle), "rtx4090"))
    pages = {**manifest.profiles[0], "pages": {"least": 2, "tuned": 200_000, "most": 200_000}}
    for activations, told in ((10**9, False), (10**11, True)):
        found = dataclasses.replace(manifest, profiles=[pages], activation_bytes=[activations])
        monkeypatch.setattr(building, "build_tensorrt", lambda *arguments, found=found: found)
        assert ("as if it copied the KV cache" in build(*arguments).stderr) is told


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_pool_that_is_compared_is_one_layers_on_one_rank(bundle: Path, ranks: int) -> None:
    """By hand: keys and values of a page; pools that are copied in no time are not told of."""
    rtx()
    build(bundle, "--target", "rtx4090", "--max-tokens", 16, "--max-batch", 2)
    opened = Bundle.open(bundle)
    model, kept = opened.manifest.model, EngineManifest.load(engine_folder(opened, "rtx4090"))
    page = 2 * model.num_key_value_heads * model.head_dim * opened.manifest.precision.activation.itemsize * 64 // ranks
    assert model.num_hidden_layers > 1

    def found(pages: int, activations: int) -> tuple[int, int] | None:
        profile = {**kept.profiles[0], "pages": {"least": 2, "tuned": pages, "most": pages}}
        return copied_pool(
            opened,
            dataclasses.replace(kept, profiles=[profile], activation_bytes=[activations], tensor_parallel=ranks),
        )

    many = 2**31 // page
    assert found(many, many * page) == (many * page, many * page)
    assert found(many, many * page - 1) is None
    assert found(2**27 // page, 2**40) is None


def test_json_names_the_engine(bundle: Path) -> None:
    rtx()
    found = json.loads(build(bundle, "--target", "rtx5090", "--max-tokens", 8, "--max-batch", 1, "--json").stdout)
    assert Path(found["engine"]).stat().st_size == found["engine_bytes"]
    assert (found["target"], found["backend"]) == ("rtx5090", "tensorrt-rtx")
    assert [profile["name"] for profile in found["profiles"]] == ["prefill"]


def test_preflight_says_what_it_proves(bundle: Path) -> None:
    rtx()
    small = ("--max-tokens", 8, "--max-batch", 1)
    result = build(bundle, "--target", "h20", "--preflight", *small)
    assert result.exit_code == 0, result.output
    assert "every plugin is found" in result.stdout
    assert "This is not the engine of h20" in result.stdout
    found = json.loads(build(bundle, "--target", "h20", "--preflight", "--json", *small).stdout)
    assert found["built_for"] == "sm_89"
    assert not (bundle / "engines" / "h20").exists()


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("--max-tokens", 8), 2, "--max-tokens: of no use for target cpu"),
        (("--preflight",), 2, "--preflight: of no use for target cpu"),
        (("--target", "rtx4090", "--max-tokens", 4), 2, "--max-tokens is 4: raise it, or lower --max-batch"),
        (("--target", "rtx4090", "--tensor-parallel", 3), 2, "cannot be split over 3 ranks: ranks are 1, 2, 4, 8"),
        (("--tensor-parallel", 0), 2, "cannot be split over 0 ranks"),
        (("--target", "rtx4090", "--optimization-level", 9), 2, "TensorRT has 0 to 5"),
        (("--target", "rtx4090", "--pages", 3), 2, "The pool has 3 pages"),
        (("--target", "rtx4090", "--pages", 10**7), 1, "has memory for"),
        (("--target", "h21"), 2, "h20-141g"),
    ],
)
def test_wrong_use_is_refused(bundle: Path, args: tuple[object, ...], code: int, message: str) -> None:
    result = build(bundle, *args)
    assert (result.exit_code, message in result.stderr) == (code, True), result.output
