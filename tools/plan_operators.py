"""Whether the kernels serve a model's sizes on a target, asked of its graph before anything is exported."""

from __future__ import annotations

from importlib.util import find_spec

from angelforge.config import ModelConfig
from angelforge.engines.kernel_checks import check_kernels
from angelforge.engines.network import prepare_network
from angelforge.engines.plan_types import PlanRequest
from angelforge.engines.profiles import StepLimits, make_profiles
from angelforge.engines.shapes import check_volumes
from angelforge.exporter.graph import build_draft_graph, build_graph
from angelforge.exporter.sources import require_exportable
from angelforge.plugins.kernel import Gpu
from angelforge.precision import Precision

NOT_ASKED = "triton is not installed, so the kernels were not asked whether they serve these sizes"
_FREE_EXPERTS, _FREE_PER_TOKEN = 512, 16  # shared ones included: up to these the experts' tiles spill no register


def check_operators(request: PlanRequest) -> str | None:
    """Draws the graph of one layer of each kind, and of the draft, and asks the kernels of their operators.

    They are asked in every profile of an engine.

    Returns why they could not be asked, or which sizes they serve badly, or None; targets that run no kernels have
    nothing to ask.

    Raises:
        AngelForgeError: naming the layer, its operator, and what its kernel cannot serve; or a tensor that is too
            large for TensorRT in a step of so many tokens.
        UsageError: the model cannot be exported.
    """
    config, target, draft = request.config, request.target, request.draft
    require_exportable(config)
    if target.sms is None:
        return None
    few = config.with_layers(_layers_of_each_kind(config))
    sizes = (request.precision, request.page_size, request.max_context)
    graphs = [(build_graph(few, *sizes, draft, request.tensor_parallel), request.tensor_parallel)]
    if draft is not None:
        graphs.append((build_draft_graph(draft, config, *sizes), 1))
    pages = 1 + -(-request.max_context // request.page_size)
    limits = StepLimits(request.max_tokens, request.max_batch, request.max_context, request.page_size, pages)
    profiles = make_profiles(limits)
    for model, ranks in graphs:
        prepare_network(model, ranks)
        check_kernels(model, profiles, Gpu(target.architecture, target.sms))
        check_volumes(model, profiles[-1].most())
    return NOT_ASKED if find_spec("triton") is None else _served_badly(request)


def _served_badly(request: PlanRequest) -> str | None:
    """A note on widths of weights that cost the matmuls speed, not rightness; None where all are multiples of a step.

    A step along such a width takes 128 bytes of every row, by copies of 16. Where the width is no multiple, each step
    masks what is beyond; where rows do not even begin at multiples of 16 bytes, copies become as narrow as they must.
    """
    config, ranks = request.config, request.tensor_parallel
    widths = {
        "hidden_size": config.hidden_size,
        "num_attention_heads × head_dim": config.num_attention_heads * config.head_dim // ranks,
        "moe_intermediate_size": config.moe_intermediate_size // ranks,
    }
    if config.first_k_dense_replace > 0:
        widths["intermediate_size"] = config.intermediate_size // ranks
    if (draft := request.draft) is not None:  # on the first device, whole; its hidden_size is the model's
        widths["the draft's num_attention_heads × head_dim"] = draft.num_attention_heads * draft.head_dim
        widths["the draft's intermediate_size"] = draft.intermediate_size
    size = 1 if request.precision is Precision.FP8 else 2  # bytes of an element
    notes = []
    for name, width in widths.items():
        whole = ranks == 1 or name == "hidden_size" or name.startswith("the draft's")
        share = "" if whole else f" on each of {ranks} devices"
        if width * size % 16:
            copies = width * size & -(width * size)  # the largest power of two that divides a row's bytes
            notes.append(
                f"{name} {width}{share} is no multiple of {16 // size}: weights are copied in pieces of {copies} B"
            )
        elif width * size % 128:
            notes.append(f"{name} {width}{share} is no multiple of {128 // size}: every step along it is masked")
    if size == 1:
        notes += _spilling(config)
    if not notes:
        return None
    return f"served, but slowly: {'; '.join(notes)}"


def _spilling(config: ModelConfig) -> list[str]:
    """Notes on what costs the FP8 experts' tile for prompts registers that it does not have, as compiled for sm_90."""
    tile = "the tile of experts for prompts (Fp8MoEGateUp) spills registers"
    if config.hidden_size % 128:
        return [tile]
    if config.experts_per_token > _FREE_PER_TOKEN:
        return [f"{tile} with {config.experts_per_token} experts a token, shared ones included"]
    if config.num_expert_slots > _FREE_EXPERTS:
        return [f"{tile} with {config.num_expert_slots} experts, shared ones included"]
    return []


def _layers_of_each_kind(config: ModelConfig) -> int:
    return min(config.num_hidden_layers, config.first_k_dense_replace + 1)
