"""Whether the kernels serve a model's sizes on a target, asked of its graph before anything is exported."""

from __future__ import annotations

from importlib.util import find_spec

from angelforge.config import ModelConfig
from angelforge.engines.kernel_checks import check_kernels
from angelforge.engines.network import prepare_network
from angelforge.engines.plan_types import PlanRequest
from angelforge.engines.profiles import StepLimits, make_profiles
from angelforge.errors import UsageError
from angelforge.exporter.graph import build_graph
from angelforge.plugins.kernel import Gpu

NOT_ASKED = "triton is not installed, so the kernels were not asked whether they serve these sizes"


def check_operators(request: PlanRequest) -> str | None:
    """Draws the graph of one layer of each kind and asks the kernels of its operators, in every profile of an engine.

    Returns why they could not be asked, or None; targets that run no kernels have nothing to ask.

    Raises:
        AngelForgeError: naming the layer, its operator, and what its kernel cannot serve.
        UsageError: the model cannot be exported.
    """
    config, target = request.config, request.target
    if not config.use_qk_norm:
        raise UsageError("The checkpoint has use_qk_norm false; only models with QK-norm can be exported.")
    if target.sms is None:
        return None
    if find_spec("triton") is None:
        return NOT_ASKED
    few = config.with_layers(_layers_of_each_kind(config))
    ranks = request.tensor_parallel
    model = build_graph(few, request.precision, request.page_size, request.max_context, ranks=ranks)
    prepare_network(model, ranks)
    pages = 1 + -(-request.max_context // request.page_size)
    limits = StepLimits(request.max_tokens, request.max_batch, request.max_context, request.page_size, pages)
    check_kernels(model, make_profiles(limits), Gpu(target.architecture, target.sms))
    return None


def _layers_of_each_kind(config: ModelConfig) -> int:
    return min(config.num_hidden_layers, config.first_k_dense_replace + 1)
