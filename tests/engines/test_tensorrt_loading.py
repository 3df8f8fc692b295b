"""Whatever differs between an engine and what is to run it is told in one sentence, before TensorRT sees the engine."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.tensorrt import graph_bundle, quiet, rtx

from angelforge.bundle import Bundle
from angelforge.engines.build import build_tensorrt
from angelforge.engines.limits import BuildOptions
from angelforge.engines.manifest import FILE, EngineManifest
from angelforge.engines.tensorrt_loading import open_tensorrt_engine
from angelforge.errors import AngelForgeError
from angelforge.plugins.tensorrt.gpu import GpuFacts
from angelforge.targets import get_target

TARGET = get_target("rtx4090")
GPU = GpuFacts("NVIDIA GeForce RTX 4090", "sm_89", 128, 25_700_000_000, "580.65.06")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    rtx()
    bundle = graph_bundle(tmp_path_factory.mktemp("bundle"))
    build_tensorrt(bundle, TARGET, BuildOptions(max_tokens=8, max_batch=2), quiet)
    return bundle


@pytest.fixture
def bundle(source: Bundle) -> Any:
    """The built bundle; what a test changes in its engine folder is put back."""
    folder = source.folder / "engines" / TARGET.name
    kept = {path: path.read_bytes() for path in (*folder.iterdir(), source.folder / "model.onnx")}
    yield source
    for path in folder.iterdir():
        path.unlink()
    for path, content in kept.items():
        path.write_bytes(content)


def folder(bundle: Bundle) -> Path:
    return bundle.folder / "engines" / TARGET.name


def change_manifest(bundle: Bundle, **values: Any) -> None:
    path = folder(bundle) / FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def open_engine(bundle: Bundle, gpu: GpuFacts = GPU, tensor_parallel: int = 1) -> Any:
    return open_tensorrt_engine(bundle, TARGET, rtx(), gpu, tensor_parallel)


def test_an_engine_opens_as_built(bundle: Bundle) -> None:
    engine = open_engine(bundle)
    assert engine.plan == (folder(bundle) / engine.manifest.engine).read_bytes()
    assert [profile.name for profile in engine.profiles] == ["prefill"]


def cut(bundle: Bundle) -> None:
    path = next(folder(bundle).glob("*.engine"))
    path.write_bytes(path.read_bytes()[:1000])


def flip(bundle: Bundle) -> None:
    path = next(folder(bundle).glob("*.engine"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove(bundle: Bundle) -> None:
    next(folder(bundle).glob("*.engine")).unlink()


def half_manifest(bundle: Bundle) -> None:
    path = folder(bundle) / FILE
    path.write_text(path.read_text()[:300])


def no_manifest(bundle: Bundle) -> None:
    (folder(bundle) / FILE).unlink()


def other_graph(bundle: Bundle) -> None:
    path = bundle.folder / "model.onnx"
    path.write_bytes(path.read_bytes() + b" ")


def manifest(**values: Any) -> Callable[[Bundle], None]:
    return lambda bundle: change_manifest(bundle, **values)


DAMAGES: list[tuple[str, Callable[[Bundle], None], str]] = [
    ("no engine", no_manifest, r"There is no engine in .*rtx4090 \(no manifest.json\).* build .* --target rtx4090\."),
    ("half a manifest", half_manifest, r"manifest.json cannot be read: .* Build the engine again"),
    ("manifest of another format", manifest(format=99), r"has format 99, this version reads 1"),
    ("manifest with another key", manifest(extra=1), r"has wrong keys: \['extra'\]"),
    ("manifest with a wrong value", manifest(page_size="64"), r"value of the wrong kind under page_size"),
    ("path instead of a name", manifest(engine="../../x"), r"value of the wrong kind under engine"),
    ("engine removed", remove, r"Cannot read .*model-\w+\.engine: there is no such file"),
    ("engine cut off", cut, r"engine for rtx4090 has 1000 bytes, expected \d+: it was cut off.* Build it again"),
    ("engine changed", flip, r"is not the file that was built: its sha256 begins with \w{12}, expected \w{12}"),
    ("other model", manifest(model_digest="0" * 64), r"built for another model configuration \(000000000000\) than"),
    ("other precision", manifest(precision="fp8"), r"built for precision fp8, but the bundle has bf16"),
    ("other context", manifest(max_context=64), r"built for contexts of 64 tokens, but the bundle has 512"),
    ("other pages", manifest(page_size=16), r"built for pages of 16 tokens, but the bundle has 64"),
    ("other YaRN", manifest(rope={"factor": 4.0}), r"rotary embedding factor 4.0, .*but the bundle has factor 1.0"),
    ("other operators", manifest(operators={"Norm": 7}), r"has the operators Norm 7, but this version has Norm 1"),
    ("operator added", manifest(operators={"Norm": 1}), r"has the operators none of them, but .*Linear 1"),
    ("other kernels", manifest(kernels={"Norm": "0" * 64}), r"has the kernels Norm 000000000000, but this version has"),
    ("bundle changed", other_graph, r"was built from another graph \(\w{12}\) than the bundle's \(\w{12}\)"),
    ("draft removed", manifest(draft_digest="a" * 64), r"built with a draft \(a{12}\), but the bundle has none"),
    ("other library", manifest(backend="tensorrt"), r"is for tensorrt, but tensorrt-rtx is to run it"),
    ("other version", manifest(backend_version="1.0"), r"built with version 1.0 of its library, but version 1\.7"),
    ("other GPU", manifest(gpu="NVIDIA L40"), r"built on a NVIDIA L40, but this machine has a NVIDIA GeForce RTX 4090"),
    ("newer driver", manifest(driver="595.1"), r"built with driver 595.1, but this machine has the older 580.65.06"),
    ("other ranks", manifest(tensor_parallel=2), r"was built for 2 ranks, but 1 are to run it"),
    ("unreadable profile", manifest(profiles=[{"name": "x"}]), r"has a profile that cannot be read"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), [d[1:] for d in DAMAGES], ids=[d[0] for d in DAMAGES])
def test_every_difference_is_one_sentence(bundle: Bundle, damage: Callable[[Bundle], None], message: str) -> None:
    """Found, needed, and what to do."""
    damage(bundle)
    with pytest.raises(AngelForgeError, match=message):
        open_engine(bundle)


def test_the_architecture_must_be_the_gpus(bundle: Bundle) -> None:
    with pytest.raises(AngelForgeError, match=r"is for the architecture sm_89, but this machine's GPU is sm_90"):
        open_engine(bundle, dataclasses.replace(GPU, architecture="sm_90"))


def test_an_older_drivers_engine_runs(bundle: Bundle) -> None:
    change_manifest(bundle, driver="570.1", gpu=GPU.name)
    assert open_engine(bundle).plan


def test_a_swapped_draft_is_told(bundle: Bundle) -> None:
    """The draft's graph is compared as it stands on disk."""
    draft = bundle.folder / "draft.onnx"
    draft.write_bytes(b"draft")
    graphs = {**bundle.manifest.graphs, "draft": draft.name}
    swapped = dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, graphs=graphs))
    with pytest.raises(AngelForgeError, match=r"was built without the draft \(\w{12}\) that the bundle has"):
        open_engine(swapped)


def test_every_fact_that_may_be_required_can_be_told() -> None:
    """No fact of an engine lacks its sentence."""
    from angelforge.engines.manifest import _DIFFERENCES

    facts = {field.name for field in dataclasses.fields(EngineManifest)}
    told_otherwise = {"target", "engine", "seconds", "built_at", "profiles", "options", "format", "activation_bytes"}
    assert set(_DIFFERENCES) == facts - told_otherwise
