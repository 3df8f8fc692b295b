"""From a bundle, a target and the options of a build to the sizes that its engine serves."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any, Literal

import onnx_ir as ir

from angelforge.bundle import Bundle
from angelforge.engines.built import built_activations
from angelforge.engines.planner import Plan, PlanRequest, plan
from angelforge.engines.profiles import StepLimits
from angelforge.engines.shapes import MAX_VOLUME, concrete_shapes
from angelforge.errors import AngelForgeError, UsageError
from angelforge.targets import Target

# Draft tokens at which published drafts of this architecture gain most (MODEL.md).
_DRAFT_DEPTH = 3
# A pool larger than this many full batches only keeps the prefixes of sequences that have ended.
_USEFUL_BATCHES = 4


Plugins = Literal["aot", "python"]


@dataclass(frozen=True)
class BuildOptions:
    """What a build may be asked for beside bundle and target; None: chosen from target and plan."""

    max_tokens: int = 8192  # in one step
    max_batch: int = 32  # sequences in one step
    draft_depth: int | None = None  # draft tokens that a step verifies for each sequence
    pages: int | None = None  # of the pool
    tensor_parallel: int = 1
    optimization_level: int | None = None  # of TensorRT, 0 to 5
    plugins: Plugins = "aot"  # of TensorRT 11: PTX in the engine, or launched from Python

    def __post_init__(self) -> None:
        if self.optimization_level is not None and not 0 <= self.optimization_level <= 5:
            raise UsageError(f"The optimization level is {self.optimization_level}, but TensorRT has 0 to 5.")

    def to_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return asdict(self)


def plan_build(bundle: Bundle, target: Target, options: BuildOptions) -> Plan:
    """What the planner says of this build.

    Raises:
        UsageError: impossible whatever the memory.
    """
    manifest = bundle.manifest
    depth = draft_depth(bundle, options)
    return plan(
        PlanRequest(
            config=manifest.model,
            precision=manifest.precision,
            target=target,
            max_context=manifest.max_context,
            tensor_parallel=options.tensor_parallel,
            page_size=manifest.page_size,
            max_tokens=options.max_tokens,
            max_batch=options.max_batch,
            draft=manifest.draft,
            activations=built_activations(bundle, target, options.to_dict() | {"draft_depth": depth}),
        )
    )


def choose_limits(
    bundle: Bundle, model: ir.Model, planned: Plan, options: BuildOptions, must_fit: bool = True
) -> StepLimits:
    """The sizes that the engine of `model` serves; the pool takes what memory the plan leaves for it.

    A model that does not fit gets a pool for one sequence where it need not fit.

    Raises:
        AngelForgeError: the model does not fit on the target; with the figures and what helps.
        UsageError: the options contradict each other or the graph.
    """
    if must_fit and not planned.fits:
        helps = f" What helps: {'; '.join(planned.remedies)}." if planned.remedies else ""
        raise AngelForgeError(f"The model does not fit on {planned.target}: {planned.problem}{helps}")
    if must_fit and options.pages is not None and options.pages > planned.pages:
        raise AngelForgeError(
            f"{options.pages} pages were asked for, but {planned.target} has memory for {planned.pages}: lower --pages."
        )
    manifest = bundle.manifest
    fixed: Mapping[str, int] = {
        "max_tokens": options.max_tokens,
        "max_batch": options.max_batch,
        "draft_depth": draft_depth(bundle, options),
        "max_context": manifest.max_context,
        "page_size": manifest.page_size,
    }
    if options.pages is not None:
        return StepLimits(pages=options.pages, **fixed)
    width = -(-manifest.max_context // manifest.page_size)
    useful = _USEFUL_BATCHES * options.max_batch * width + 1
    return StepLimits(pages=max(min(planned.pages, useful, _most_pages(model)), width + 1), **fixed)


def draft_depth(bundle: Bundle, options: BuildOptions) -> int:
    """Draft tokens that a step verifies for each sequence: as asked for, else 3 where the bundle has a draft."""
    if options.draft_depth is not None:
        return options.draft_depth
    return _DRAFT_DEPTH if "draft" in bundle.manifest.graphs else 0


def _most_pages(model: ir.Model) -> int:
    """Pages with which every tensor that grows with the pool stays below TensorRT's limit."""
    others = dict.fromkeys(("T", "B", "P", "R"), 1) | {"B+1": 2}
    few, many = (concrete_shapes(model, {**others, "pages": pages}) for pages in (1000, 2000))
    growth = max((prod(many[value]) - prod(few[value])) / 1000 for value in few)  # elements a page
    return int((MAX_VOLUME - 1) / max(growth, 1))
