"""`angelforge plan`: from the command line, on real shapes without a byte of weights."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from click.testing import CliRunner, Result

from angelforge.config import ModelConfig
from angelforge.draft_config import DraftConfig
from angelforge.engines.plan_types import PlanRequest
from angelforge.errors import AngelForgeError
from angelforge.exporter.synthetic import FULL_CONFIG, small_config, write_checkpoint
from angelforge.exporter.synthetic_config import FP8_BLOCK
from angelforge.exporter.synthetic_draft import FULL_DRAFT_CONFIG
from angelforge.plugins import tuning
from angelforge.plugins.kernel import Tile
from angelforge.plugins.tuning import Row
from angelforge.precision import Precision
from angelforge.targets import get_target
from angelforge.tools.cli import main
from angelforge.tools.plan_operators import check_operators


def run(*arguments: object) -> Result:
    """`angelforge plan` with these arguments."""
    return CliRunner().invoke(main, ["plan", *map(str, arguments)])


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """The FP8 model's folder with nothing but its configuration."""
    (tmp_path / "config.json").write_text(json.dumps({**FULL_CONFIG, "quantization_config": FP8_BLOCK}))
    return tmp_path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint with weights."""
    return write_checkpoint(tmp_path_factory.mktemp("small"), small_config(), tokenizer=False)


def test_what_does_not_fit_comes_with_remedies(full: Path) -> None:
    """The FP8 model on one 96 GB H20: figures, and options that help."""
    result = run(full, "--target", "h20")
    assert result.exit_code == 0
    for text in ("104.3 GB", "102.6 GB", "It does not fit", "--tensor-parallel 2", "--target h200", "no weights are"):
        assert text in result.output


def test_what_fits(full: Path) -> None:
    """Two H20 with 128K: split weights, sequences, limits, and the note on YaRN."""
    result = run(full, "--target", "h20", "--tensor-parallel", 2, "--rope-scaling", "yarn:4")
    assert result.exit_code == 0
    for text in ("2 × h20", "It fits", "on every device", "short prompts", "131,072"):
        assert text in result.output


def test_all_targets_are_compared(full: Path) -> None:
    """Without --target: a row each; several devices leave the CPU out."""
    output = run(full).output
    assert [name for name in ("cpu", "h20-141g", "rtx5090") if name not in output] == []
    plans = json.loads(run(full, "--tensor-parallel", 2, "--json").output)["plans"]
    assert {p["target"] for p in plans} >= {"h20", "h200"}
    assert "cpu" not in {p["target"] for p in plans}


def test_json(full: Path) -> None:
    """The model and a list of plans."""
    result = json.loads(run(full, "--target", "h200", "--json").output)
    assert result["model"]["config"]["hidden_size"] == 4096
    assert result["model"]["parameters"] == pytest.approx(103e9, rel=0.01)
    assert [(p["target"], p["fits"], p["precision"]) for p in result["plans"]] == [("h200", True, "fp8")]


def test_headers_are_checked(small: Path, tmp_path: Path) -> None:
    """A folder with weights is compared with its configuration; --layers cuts it."""
    found = json.loads(run(small, "--target", "cpu", "--json").output)
    assert found["model"]["tensors"] > 100
    assert found["plans"][0]["fits"]
    cut = json.loads(run(small, "--target", "cpu", "--json", "--layers", 1).output)
    assert cut["model"]["tensors"] < found["model"]["tensors"] / 2
    assert any("first 1 of 4" in note for note in cut["model"]["notes"])
    for file in small.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(small_config(num_experts=32)))
    result = run(tmp_path, "--target", "cpu")
    assert result.exit_code == 1
    assert "missing" in result.output


@pytest.mark.parametrize(("torch_dtype", "precision"), [("bfloat16", "bf16"), ("float32", "fp32"), ("float16", "bf16")])
def test_the_checkpoints_own_precision_is_the_default(tmp_path: Path, torch_dtype: str, precision: str) -> None:
    """And --precision overrides it."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(small_config(torch_dtype=torch_dtype)))
    assert json.loads(run(file, "--target", "cpu", "--json").output)["plans"][0]["precision"] == precision
    other = run(file, "--target", "cpu", "--json", "--precision", "fp32").output
    assert json.loads(other)["plans"][0]["precision"] == "fp32"


def test_of_a_hub_id_only_the_configuration_is_downloaded(full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No 104 GB for a plan."""
    asked: list[str] = []

    def download(_: str, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return str(full)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert run("org/name", "--target", "h200").exit_code == 0
    assert asked == ["config.json", "generation_config.json"]


WRONG: list[tuple[list[Any], int, str]] = [
    (["--target", "h21"], 2, "h20-141g"),
    (["--target", "h20", "--tensor-parallel", 3], 2, "Possible: 1, 2, 4"),
    (["--target", "h20", "--max-context", 100000], 2, "--rope-scaling yarn:4"),
    (["--target", "h20", "--max-context", 0], 2, "max_context"),
    (["--target", "h20", "--memory-gb", -1], 2, "--memory-gb"),
    (["--target", "h20", "--memory-gb", "nan"], 2, "--memory-gb"),
    (["--rope-scaling", "linear:2"], 2, "yarn:4"),
    (["--layers", 99], 2, "32"),
    (["--precision", "int4"], 2, "int4"),
]


@pytest.mark.parametrize(("options", "code", "told"), WRONG)
def test_wrong_use_is_told_in_a_sentence(full: Path, options: list[Any], code: int, told: str) -> None:
    """Exit code 2 and no traceback."""
    result = run(full, *options)
    assert (result.exit_code, told in result.output, "Traceback" in result.output) == (code, True, False)


def test_absent_checkpoints_fail(tmp_path: Path) -> None:
    """Exit code 1, also as JSON."""
    result = run(tmp_path / "absent", "--json")
    assert result.exit_code == 1
    assert "There is no folder" in result.output


def test_memory_can_be_given(full: Path) -> None:
    """For machines that are no row of the table."""
    result = json.loads(run(full, "--target", "cpu", "--memory-gb", 200, "--json").output)
    assert result["plans"][0]["memory"] == 200 * 10**9
    assert result["plans"][0]["fits"]


def test_help_has_an_example() -> None:
    """As every command."""
    assert "angelforge plan AntAngelMed-FP8 --target h20" in run("--help").output


def changed(folder: Path, **keys: Any) -> Path:
    """A config.json of the full model with other values."""
    file = folder / "changed.json"
    file.write_text(json.dumps({**FULL_CONFIG, **keys}))
    return file


def test_what_no_kernel_serves_is_refused_by_operator(tmp_path: Path) -> None:
    """A head that no kernel takes: the operator's name, before anything is exported; a CPU takes it."""
    config = changed(tmp_path, head_dim=48)
    result = run(config, "--target", "h200")
    assert result.exit_code == 1
    assert "layers.0/attention" in result.output and "(QKVPrepare)" in result.output and "head_dim 48" in result.output
    assert run(config, "--target", "cpu", "--memory-gb", 500).exit_code == 0
    compared = run(config)
    assert compared.exit_code == 0
    assert compared.output.count("QKVPrepare") == 2  # layer and operator, in one note for all targets


def test_sizes_that_are_served_slowly_are_noted(tmp_path: Path) -> None:
    """Right but slow: widths off 128 bytes are masked, off 16 bytes copied in pieces; the model's own are neither."""
    h20 = get_target("h20")

    def note(precision: Precision, ranks: int = 1, **keys: Any) -> str | None:
        config = ModelConfig.load(changed(tmp_path, **keys)).with_layers(2)
        return check_operators(PlanRequest(config, precision, h20, 4096, tensor_parallel=ranks))

    assert note(Precision.FP8) is None and note(Precision.BF16) is None
    assert "hidden_size 4160 is no multiple of 128: every step" in (note(Precision.FP8, hidden_size=4160) or "")
    assert note(Precision.BF16, hidden_size=4160) is None
    assert "hidden_size 4100 is no multiple of 16: weights are copied in pieces of 4 B" in (
        note(Precision.FP8, hidden_size=4100) or ""
    )
    assert "moe_intermediate_size 1000 is no" in (note(Precision.BF16, moe_intermediate_size=1000) or "")
    assert (
        "note: h20: served, but slowly: hidden_size 4160"
        in run(changed(tmp_path, hidden_size=4160), "--target", "h20", "--precision", "fp8").output
    )


def test_a_draft_that_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    """Scales that cannot be stacked: one check for `plan` and `export`; in bf16 they need not be."""
    source = changed(tmp_path)
    (tmp_path / "draft").mkdir()
    draft = {**FULL_DRAFT_CONFIG, "num_key_value_heads": 1, "head_dim": 64, "quantization_config": FP8_BLOCK}
    (tmp_path / "draft" / "config.json").write_text(json.dumps(draft))
    arguments = (source, "--draft", tmp_path / "draft", "--target", "h200", "--precision")
    for target in ((), ("--target", "h200")):
        refused = run(*arguments[:3], *target, "--precision", "fp8")
        assert refused.exit_code == 1 and "key rows are 64" in refused.output
    assert run(*arguments, "bf16").exit_code == 0


def test_a_drafts_operators_are_asked_too(tmp_path: Path) -> None:
    """What no kernel serves is refused with the draft's layer and operator; what is slow is noted as the draft's."""
    config = ModelConfig.load(changed(tmp_path)).with_layers(2)
    captured = {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1]}}

    def note(ranks: int = 1, **keys: Any) -> str | None:
        draft = DraftConfig.from_dict({**FULL_DRAFT_CONFIG, **captured, **keys}, config)
        h20 = get_target("h20")
        return check_operators(PlanRequest(config, Precision.FP8, h20, 4096, draft=draft, tensor_parallel=ranks))

    assert note() is None and note(2) is None
    with pytest.raises(AngelForgeError, match=r"draft/midlayer/self_attn.*\(QKVRotate\).*head_dim 48"):
        note(head_dim=48)
    slow = note(2, intermediate_size=14400, head_dim=64, num_attention_heads=33, num_key_value_heads=3) or ""
    assert "the draft's num_attention_heads × head_dim 2112 is no multiple of 128" in slow
    assert "the draft's intermediate_size 14400 is no multiple of 128" in slow


def test_a_tuned_tile_that_no_kernel_takes_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The plan asks for the tiles that a build would take, those of the tuning table before the kernels' own."""
    row = Row("Fp8Linear", "NVIDIA H20", "sm_90", 78, "64", (), Tile(m=64, n=256), 1.0)
    monkeypatch.setattr(tuning, "packaged_rows", lambda: (row,))
    config = ModelConfig.load(changed(tmp_path)).with_layers(2)
    with pytest.raises(AngelForgeError, match=r"\(Fp8Linear\) in profile decode-64: FP8 tiles have"):
        check_operators(PlanRequest(config, Precision.FP8, get_target("h20"), 4096))


def test_a_model_that_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    """Without QK-norm there is no graph."""
    result = run(changed(tmp_path, use_qk_norm=False), "--target", "h20")
    assert result.exit_code == 2
    assert "use_qk_norm" in result.output


def test_gpus_without_fp8_are_refused_for_fp8(tmp_path: Path) -> None:
    """Ampere has no FP8 arithmetic: the first operator that needs it is named."""
    config = ModelConfig.load(changed(tmp_path)).with_layers(2)
    ampere = replace(get_target("h20"), architecture="sm_80", sms=108)
    request = PlanRequest(config, Precision.FP8, ampere, 4096)
    with pytest.raises(AngelForgeError, match=r"\(Fp8Linear\).*FP8 needs sm_89 or newer, the GPU is sm_80"):
        check_operators(request)
    assert check_operators(replace(request, precision=Precision.BF16)) is None


def test_numbers_of_devices_are_compared(full: Path) -> None:
    """One row each, with what they tell each other; a single one is told in full."""
    result = run(full, "--target", "h20", "--precision", "fp8", "--tensor-parallel", "1,2,8")
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines() if line.strip().startswith("h20 ")]
    assert [row[:3] for row in rows] == [["h20", "1", "no"], ["h20", "2", "yes"], ["h20", "8", "yes"]]
    assert "0.66 ms" in result.stdout
    assert "sums over devices" in run(full, "--target", "h20", "--precision", "fp8", "--tensor-parallel", "2").stdout
    assert "numbers of devices" in run(full, "--tensor-parallel", "two").stderr
    assert "numbers of devices" in run(full, "--tensor-parallel", "²").stderr
