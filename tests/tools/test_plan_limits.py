"""What the kernels and TensorRT cannot serve, found by `plan` on configurations alone."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from angelforge.config import ModelConfig
from angelforge.engines.plan_types import PlanRequest
from angelforge.exporter.synthetic import FULL_CONFIG
from angelforge.precision import Precision
from angelforge.targets import get_target
from angelforge.tools.cli import main
from angelforge.tools.plan_operators import check_operators

pytest.importorskip("triton")


def plan(folder: Path, *options: str, **keys: Any) -> Result:
    """`angelforge plan` of the full model with other values in its configuration."""
    file = folder / "config.json"
    file.write_text(json.dumps({**FULL_CONFIG, **keys}))
    return CliRunner().invoke(main, ["plan", str(file), "--precision", "fp8", "--layers", "2", *options])


WIDE = {"num_experts": 1024, "moe_intermediate_size": 256}  # 1025 with the shared one
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"head_dim": 256, "num_attention_heads": 16}, "(PagedAttention) in profile decode-8: PagedAttention's kernel"),
    ({"head_dim": 512, "num_attention_heads": 8}, "from 16 to 128, got 512"),
    ({"num_experts_per_tok": 32}, "(MoERoute) in profile decode-8: the kernels take at most 32 experts a token"),
    (WIDE, "(MoERoute) in profile decode-8: the kernels take at most 1024 experts, shared ones included, got 1025"),
]


@pytest.mark.parametrize(("keys", "told"), REFUSED)
def test_what_no_kernel_serves_is_refused_by_operator(tmp_path: Path, keys: dict[str, Any], told: str) -> None:
    """Heads, experts of a token, experts of all; a CPU, which runs no kernels, takes them."""
    result = plan(tmp_path, "--target", "h200", **keys)
    assert result.exit_code == 1
    assert told in result.output
    assert plan(tmp_path, "--target", "cpu", "--memory-gb", "500", **keys).exit_code == 0


def test_the_largest_counts_of_experts_are_served(tmp_path: Path) -> None:
    """At the limits: served, with a note where tiles spill registers."""

    def note(**keys: Any) -> str | None:
        config = ModelConfig.from_dict({**FULL_CONFIG, **keys}).with_layers(2)
        return check_operators(PlanRequest(config, Precision.FP8, get_target("h200"), 4096, max_tokens=512))

    assert note(num_experts_per_tok=15) is None
    assert "with 17 experts a token" in (note(num_experts_per_tok=16) or "")
    assert "with 32 experts a token" in (note(num_experts_per_tok=31) or "")
    few = {"moe_intermediate_size": 256, "num_shared_experts": 0, "n_group": 1, "topk_group": 1}
    assert note(**few, num_experts=512) is None
    assert "(Fp8MoEGateUp) spills registers with 1024 experts" in (note(**few, num_experts=1024) or "")


@pytest.mark.parametrize("target", ["h200", "rtx5090"])
def test_steps_that_tensorrt_refuses_are_refused(tmp_path: Path, target: str) -> None:
    """A tensor of 2³¹ elements in the largest step, as `build` would say; one rank's share may be smaller."""
    refused = plan(tmp_path, "--target", target, "--max-tokens", "65536")
    assert refused.exit_code == 1
    assert "expert_out would have 2415919104 elements" in refused.output and "Lower --max-tokens" in refused.output
    assert plan(tmp_path, "--target", target, "--max-tokens", "58254").exit_code == 0


def test_weights_too_wide_for_a_rank_are_refused(tmp_path: Path) -> None:
    """Experts of a width that one rank's stack cannot have, and that two ranks share."""
    keys = {"num_experts": 512}
    refused = plan(tmp_path, "--target", "h200", **keys)
    assert refused.exit_code == 1 and "--tensor-parallel shares it" in refused.output
    assert plan(tmp_path, "--target", "h200", "--tensor-parallel", "2", **keys).exit_code == 0
