"""The same steps through the engine that `run` and `serve` use: TensorRT, with random weights in place of files."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from angelforge.bundle import Bundle
from angelforge.dtypes import DType
from angelforge.engines.build import build_tensorrt
from angelforge.engines.limits import BuildOptions
from angelforge.engines.tensorrt_loading import TensorrtEngine, open_tensorrt_engine
from angelforge.errors import AngelForgeError
from angelforge.exporter.graph import build_graph
from angelforge.plugins.tensorrt.gpu import GpuFacts
from angelforge.plugins.tensorrt.library import Flavour, Library, load_library
from angelforge.runtime.device import Device, open_device
from angelforge.runtime.device_weights import DeviceWeights
from angelforge.runtime.tensorrt_engine import EngineOptions, TensorRTEngine, WeightSource
from angelforge.runtime.tensorrt_loading import register_plugins
from angelforge.runtime.weight_layout import WeightLayout
from angelforge.targets import Target
from angelforge.tensorfile import TensorInfo
from angelforge.tools.device_step.graph_bundle import write_graph_bundle
from angelforge.tools.device_step.measure import Figures
from angelforge.tools.device_step.memory import PAGE_SIZE, Subject
from angelforge.tools.device_step.model import fill_pools
from angelforge.tools.device_step.sequences import Case, decode_batch
from angelforge.tools.device_step.weights import Weights, empty_weights, fill_weights
from angelforge.tools.kernel_bench.measure import Machine
from angelforge.tools.kernel_bench.statistics import summarise
from angelforge.tools.kernel_bench.timing import STEP_WARM, spans, warm_up

NAME = "TensorRT"
MIN_TOKENS = 512  # of the largest profile: more than the decoding ones have
STEPS = 8  # between two events; they follow one another as `serve` puts them: the host packs one while another runs

Say = Callable[[str], None]


def measure_through_tensorrt(
    facts: GpuFacts, machine: Machine, subject: Subject, measured: Sequence[Figures], rounds: int, say: Say
) -> Iterator[Figures]:
    """Builds an engine for the cases that the kernels have run, and times its steps on the same weights and tokens.

    Yields each case's as it is known.

    Raises:
        AngelForgeError: there is no TensorRT, it does not build or run this engine, or memory does not suffice.
        RuntimeError: torch or CUDA fail.
    """
    library = find_library(machine)
    cases = [figures.case for figures in measured]
    with TemporaryDirectory(prefix="angelforge-device-") as folder:
        bundle = write_graph_bundle(subject, Path(folder))
        say(f"{library.title}: building the engine …")
        opened = build_engine(bundle, library, facts, cases)
        say(f"{library.title}: making random weights, capturing steps …")
        register_plugins(opened, library)
        engine = random_engine(bundle, opened, library, open_device("cuda:0"), subject, cases)
    try:
        for before in measured:
            say(f"{library.title}, {before.case}: {rounds} times {STEPS} steps …")
            yield measure_engine(engine, subject, before, rounds)
    finally:
        engine.close()


def find_library(machine: Machine) -> Library:
    """The TensorRT that this GPU's target takes, else the other: what it does not build for, it says itself.

    Raises:
        AngelForgeError: none is installed.
    """
    rtx_first = machine.target is not None and machine.target.backend == "tensorrt-rtx"
    order: tuple[Flavour, Flavour] = ("tensorrt-rtx", "tensorrt") if rtx_first else ("tensorrt", "tensorrt-rtx")
    problems = []
    for flavour in order:
        try:
            return load_library(flavour)
        except AngelForgeError as error:
            problems.append(str(error))
    raise AngelForgeError(" ".join(problems))


def build_engine(bundle: Bundle, library: Library, facts: GpuFacts, cases: Sequence[Case]) -> TensorrtEngine:
    """The engine for steps of these cases, built on this GPU and opened again as `run` does.

    Raises:
        AngelForgeError: TensorRT refuses, or memory does not suffice.
    """
    target = Target(
        "this-gpu", facts.architecture, facts.memory_bytes, None, facts.sms, None, None, None, library.flavour
    )
    batch = max(case.batch for case in cases)
    options = BuildOptions(
        max_tokens=max(MIN_TOKENS, batch),
        max_batch=batch,
        pages=_pages(cases),
        plugins="aot" if library.flavour == "tensorrt" else "python",
    )
    build_tensorrt(bundle, target, options, lambda phase, share: None)
    return open_tensorrt_engine(bundle, target, library, facts)


def random_engine(
    bundle: Bundle,
    opened: TensorrtEngine,
    library: Library,
    device: Device,
    subject: Subject,
    cases: Sequence[Case],
) -> TensorRTEngine:
    """The engine with the weights, keys and values that the kernels had: the seeds are the same."""
    model = build_graph(subject.config, subject.precision, PAGE_SIZE, subject.max_context)
    shapes = empty_weights(model, "meta")

    def make(layout: WeightLayout, where: Device) -> DeviceWeights:
        made = DeviceWeights(layout, where.allocate(layout.nbytes))
        taken = {name: shape for name, shape in shapes.items() if name in layout.placements}
        views: Weights = {n: made.bytes_of(n).view(w.dtype).view(w.shape) for n, w in taken.items()}
        fill_weights(views, subject.config.rope_theta, subject.seed)
        return made

    options = EngineOptions(
        num_pages=_pages(cases),
        max_batch=max(case.batch for case in cases),
        weights=WeightSource(_as_if_in_a_file(shapes), make),
    )
    engine = TensorRTEngine(bundle, opened, library, device, options)
    fill_pools(list(engine.pools.values()), subject.seed)
    return engine


def measure_engine(engine: TensorRTEngine, subject: Subject, before: Figures, rounds: int) -> Figures:
    """Steps of one case; what they took of the experts is what the kernels of the same model took."""
    batch = decode_batch(subject.config, before.case, PAGE_SIZE, subject.seed)
    logits = engine.forward(batch).clone()
    warm_up(lambda: engine.forward(batch), STEP_WARM)
    again = engine.forward(batch)
    same, host = torch.equal(again, logits), logits.cpu()
    timing = summarise(spans(lambda: engine.forward(batch), rounds, STEPS))
    return Figures(
        case=before.case,
        timing=timing,
        experts=before.experts,
        finite=bool(host.isfinite().all()),
        repeatable=same,
        through=NAME,
        logits=host,
        cosine=_cosine(host, before.logits),
    )


def _pages(cases: Sequence[Case]) -> int:
    return max(case.pages(PAGE_SIZE) for case in cases)


def _cosine(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """0 where a value is not finite."""
    cosine = torch.nn.functional.cosine_similarity(found.double().flatten(), wanted.double().flatten(), dim=0)
    return float(cosine.nan_to_num(0.0))


_DTYPES = {
    torch.float32: DType.F32, torch.bfloat16: DType.BF16, torch.float8_e4m3fn: DType.F8_E4M3,
}  # fmt: skip


def _as_if_in_a_file(shapes: Mapping[str, torch.Tensor]) -> dict[str, TensorInfo]:
    """Names, types and shapes as the runtime places them: one behind another in a file that there is not."""
    found, offset = {}, 0
    for name, weight in shapes.items():
        size = weight.numel() * weight.element_size()
        found[name] = TensorInfo(name, _DTYPES[weight.dtype], tuple(weight.shape), Path(), offset, size)
        offset += size
    return found
