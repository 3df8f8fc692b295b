"""A step without a model: the real stepper, tokenizer, sampler and TensorRT runner around an engine that is empty."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from time import perf_counter
from typing import Any

import numpy as np
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from angelforge.config import ModelConfig
from angelforge.engines.profiles import StepLimits, make_profiles
from angelforge.exporter.synthetic_config import FULL_CONFIG
from angelforge.runtime.batch import INPUTS, Batch, Float32, Int64
from angelforge.runtime.choosing import Chooser
from angelforge.runtime.device import open_device
from angelforge.runtime.device_adjusting import Place
from angelforge.runtime.device_kernels import KernelWork
from angelforge.runtime.device_round import Round, Scored
from angelforge.runtime.device_sampling import Answer, DeviceSampler
from angelforge.runtime.limits import Limits
from angelforge.runtime.llm import LLM
from angelforge.runtime.packing import Padding
from angelforge.runtime.request import Delta, Request
from angelforge.runtime.sampler import sample
from angelforge.runtime.sampling import SamplingParams
from angelforge.runtime.speculation import Speculator
from angelforge.runtime.stepper import Stepper
from angelforge.runtime.tensorrt_buckets import Buckets
from angelforge.runtime.tensorrt_runner import Fixed, Runner
from angelforge.runtime.tensorrt_session import TensorrtSession
from angelforge.runtime.tokenizer import Tokenizer
from angelforge.tools.empty_draft import EmptyDraft, Script
from angelforge.tools.no_tensorrt import empty_library
from angelforge.tools.no_triton import launch_nothing

VOCAB, PAGE_SIZE, CONTEXT, BOUND = 157_184, 64, 131_072, 614


@dataclass
class Timed:
    """µs of each measured step."""

    steps: list[float] = field(default_factory=list)  # whole, without the arithmetic of sampling
    launches: list[float] = field(default_factory=list)  # of it: size, padding, copy, launch of the captured step
    draws: list[float] = field(default_factory=list)
    idle: list[float] = field(default_factory=list)  # of it: what a GPU waits for, from a step's end to the next launch
    drafts: list[float] = field(default_factory=list)  # of it: all calls of a draft, and what it is told and remembered
    tokens: list[int] = field(default_factory=list)  # that the step gave, of all requests
    bound: float = 0.0  # for binding the engine's tensors to one captured size, once


class NoEngine:
    """Runs a step as a TensorRT engine does and answers with logits that lie in memory already.

    The runner is the real one, on a GPU if there is one: it binds 614 tensors when it captures a size, and a step
    writes the bookkeeping inputs, in one copy, and launches what was captured.
    """

    def __init__(self, batch: int, num_pages: int, on_host: bool, depth: int = 0) -> None:
        """For `batch` sequences with `depth` proposals each; `on_host` keeps off a GPU that is there."""
        self.config = ModelConfig.from_dict(FULL_CONFIG)
        self.page_size, self.num_pages, self.max_context = PAGE_SIZE, num_pages, CONTEXT
        self.device = device = open_device("cpu" if on_host or not torch.cuda.is_available() else "cuda:0")
        rows = batch * (1 + depth)
        self.limits = limits = StepLimits(max(1024, rows), batch, CONTEXT, PAGE_SIZE, num_pages, depth)
        buckets = Buckets(make_profiles(limits), batch, depth)
        names = [*INPUTS, *(f"tensor.{number}" for number in range(BOUND - len(INPUTS)))]
        fixed = Fixed(
            addresses={name: 256 * number for number, name in enumerate(names, 1)},
            shapes={},
            activations=device.allocate(256),
            page_size=PAGE_SIZE,
            largest=Padding(limits.max_tokens, batch, limits.pages_per_sequence, rows),
        )
        session = TensorrtSession(empty_library(names, device.torch), b"")
        self.stream = device.stream()
        self._runner = Runner(session, device, self.stream, buckets, fixed)
        begin = perf_counter()
        self._runner.capture()
        self.bound = (perf_counter() - begin) / len(buckets.captured)
        logits: Float32 = np.random.default_rng(0).standard_normal((rows, VOCAB), np.float32) * 3
        self.logits: Any = logits if on_host else torch.from_numpy(logits).to(device.torch)
        self.seconds = 0.0

    def forward(self, batch: Batch) -> Any:
        begin = perf_counter()
        self._runner.run(batch)
        self.seconds = perf_counter() - begin
        return self.logits[: batch.logit_indices.shape[0]]

    def close(self) -> None:
        """Gives the runner back."""
        self._runner.close()


class HostDraw:
    """Samples in NumPy."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, logits: Float32, requests: Sequence[Request]) -> Int64:
        begin = perf_counter()
        ids = sample(logits, requests)
        self.seconds = perf_counter() - begin
        return ids


class DeviceDraw(DeviceSampler):
    """Samples on a device; where there is no GPU, by the kernels of one that are launched on nothing.

    So a step does all that the host does for a device: packing and sending what it is told, launching, dealing out what
    it answers. The ids are a script's, others in each step, as they are in a text.
    """

    def __init__(self, device: torch.device, script: Script) -> None:
        if device.type != "cuda":
            launch_nothing()
        super().__init__(device, KernelWork())
        self.work.prepare(VOCAB, device)
        self._script = script
        self.seconds = 0.0  # of the last round
        self.hidden = 0.0  # of it what is done while the device still computes the step: all that is handed out

    def answer(self, logits: torch.Tensor, draws: Sequence[Place], scored: Sequence[Scored] = ()) -> Answer:
        """As the sampler's."""
        begin = perf_counter()
        round_ = Round(draws, scored)
        packed = self.prepare(round_, logits.shape[1])
        parcel = round_.compute(logits, packed, self.histories, self.work)
        self.hidden = perf_counter() - begin
        made = Answer(round_, parcel.fetch())
        made.tokens = self._script.draw(len(draws))
        self.seconds = perf_counter() - begin
        return made


def measure(batch: int, steps: int, prompt: int, on_host: bool, depth: int = 0) -> Timed:
    """Times decoding steps of `batch` requests after prompts of `prompt` tokens, with `depth` proposals for each.

    Every proposal passes. With proposals only a device samples.
    """
    torch.set_num_threads(1)  # the copy that stands for the one to a device is not worth two
    # Tokens: the first decode while the last are computed.
    limit = (2 * batch * (prompt // 512 + 1) + steps + 50) * (1 + depth)
    pages = max(batch * (-(-(prompt + limit) // PAGE_SIZE) + 1), CONTEXT // PAGE_SIZE) + 1
    engine, script = NoEngine(batch, pages, on_host, depth), Script(VOCAB, 1 + depth)
    here, there = HostDraw(), DeviceDraw(torch.device("cpu") if on_host else engine.logits.device, script)
    llm = LLM.from_engine(engine, synthetic_tokenizer(), max_batch=batch)
    limits = Limits(PAGE_SIZE, pages, CONTEXT, batch, engine.limits.max_tokens)
    draft = EmptyDraft(engine.device, engine.stream, engine.limits, script) if depth else None
    speculator = None if draft is None else Speculator(draft, limits, depth)
    stepper = Stepper(engine, limits, speculator, Chooser(here, there))
    _start(llm, stepper, batch, prompt, limit)
    found = Timed(bound=1e6 * engine.bound)
    outbox: deque[Delta] = next(iter(stepper.scheduler.running)).outbox
    for _ in range(steps):
        outbox.clear()
        before = 0.0 if speculator is None else speculator.total.draft_seconds
        begin = perf_counter()
        stepper.step()
        seconds = perf_counter() - begin
        found.steps.append(1e6 * (seconds - (here.seconds if on_host else 0.0)))
        found.launches.append(1e6 * engine.seconds)
        found.idle.append(found.steps[-1] - 1e6 * (0.0 if on_host else there.hidden))
        found.draws.append(1e6 * (here.seconds if on_host else there.seconds))
        found.tokens.append(sum(len(delta.token_ids) for delta in outbox))
        if speculator is not None:
            found.drafts.append(1e6 * (speculator.total.draft_seconds - before))
    if draft is not None:
        draft.close()
    engine.close()
    return found


def _params(index: int, limit: int) -> SamplingParams:
    """Everything at once."""
    return SamplingParams(
        max_tokens=limit,
        ignore_eos=True,
        temperature=0.8,
        top_k=50,
        top_p=0.95,
        repetition_penalty=1.05,
        presence_penalty=0.3,
        frequency_penalty=0.2,
        seed=index,
        stop=("\n\nUser:", "###", "</answer>"),
    )


def _start(llm: LLM, stepper: Stepper, batch: int, prompt: int, limit: int) -> None:
    """Requests that ask for everything, until all of them decode."""
    rng = np.random.default_rng(2)
    outbox: deque[Delta] = deque()
    for index in range(batch):
        ids = rng.integers(256, VOCAB - 1, prompt).tolist()
        stepper.add(llm.make_request(ids, _params(index, limit), outbox, index=index))
    while stepper.scheduler.waiting or any(request.computed < prompt for request in stepper.scheduler.running):
        stepper.step()
    for _ in range(20):
        stepper.step()
    assert len(stepper.scheduler.running) == batch


@cache
def synthetic_tokenizer() -> Tokenizer:
    """A byte-level tokenizer of the real vocabulary's size: 256 bytes, words of two to nine letters, an end token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {letter: token for token, letter in enumerate(alphabet)}
    rng = np.random.default_rng(3)
    letters = np.array(list("Ġabcdefghijklmnopqrstuvwxyz"))
    while len(words) < VOCAB - 1:
        for size in rng.integers(2, 10, 4096).tolist():
            word = "".join(letters[rng.integers(0, len(letters), size)])
            if len(words) < VOCAB - 1:
                words.setdefault(word, len(words))
    library = tokenizers.Tokenizer(models.BPE(words, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<|endoftext|>"])
    return Tokenizer(library)
