"""All of a build that needs neither TensorRT nor a GPU: plan, graph and profiles, checked against each other."""

from dataclasses import dataclass

import onnx_ir as ir

from angelforge.bundle import Bundle
from angelforge.engines.kernel_checks import check_kernels
from angelforge.engines.limits import BuildOptions, choose_limits, plan_build
from angelforge.engines.manifest import graph_file
from angelforge.engines.network import prepare_network
from angelforge.engines.plan_types import Plan
from angelforge.engines.profiles import Profile, make_profiles
from angelforge.engines.shapes import check_volumes
from angelforge.plugins.kernel import Gpu
from angelforge.targets import Target


@dataclass(frozen=True)
class PreparedGraph:
    """One graph of a bundle, ready for the parser."""

    role: str  # "target" or "draft"
    model: ir.Model
    weights: tuple[str, ...]  # inputs that are weights


@dataclass(frozen=True)
class Prepared:
    """What is known before TensorRT starts; the target's graph comes last."""

    graphs: tuple[PreparedGraph, ...]
    profiles: tuple[Profile, ...]
    plan: Plan

    @property
    def target(self) -> PreparedGraph:
        """The target's graph."""
        return self.graphs[-1]


def prepare_build(bundle: Bundle, target: Target, options: BuildOptions, must_fit: bool = True) -> Prepared:
    """Graphs and profiles of a build.

    Raises:
        AngelForgeError: the model must fit and does not, a graph is not one that TensorRT can take, or no kernel
            serves its sizes or types.
        UsageError: options that contradict each other.
    """
    planned = plan_build(bundle, target, options)
    roles = [role for role in ("draft", "target") if role in bundle.manifest.graphs]
    graphs = tuple(_prepare(bundle, role, options.tensor_parallel) for role in roles)
    limits = choose_limits(bundle, graphs[-1].model, planned, options, must_fit)
    profiles = make_profiles(limits)
    for graph in graphs:
        check_volumes(graph.model, profiles[-1].most())
        if target.sms is not None:
            check_kernels(graph.model, profiles, Gpu(target.architecture, target.sms))
    return Prepared(graphs, profiles, planned)


def _prepare(bundle: Bundle, role: str, ranks: int) -> PreparedGraph:
    model = ir.load(graph_file(bundle, role, ranks))
    return PreparedGraph(role, model, prepare_network(model, ranks if role == "target" else 1))
