"""A step without a model: the real stepper, tokenizer, buckets and staging around an engine that computes nothing."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from time import perf_counter

import numpy as np
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from angelforge.config import ModelConfig
from angelforge.engines.profiles import StepLimits, make_profiles
from angelforge.exporter.synthetic_config import FULL_CONFIG
from angelforge.runtime.batch import Batch, Float32, Int64
from angelforge.runtime.device import open_device
from angelforge.runtime.device_adjusting import pack_adjustments
from angelforge.runtime.device_largest import RowRules, candidates_of, draw_each, largest_of
from angelforge.runtime.limits import Limits
from angelforge.runtime.llm import LLM
from angelforge.runtime.packing import Padding
from angelforge.runtime.request import Delta, Request
from angelforge.runtime.sampler import sample
from angelforge.runtime.sampling import SamplingParams
from angelforge.runtime.stepper import Stepper
from angelforge.runtime.tensorrt_buckets import Buckets
from angelforge.runtime.tensorrt_inputs import InputArena, InputLayout, layout_of
from angelforge.runtime.tokenizer import Tokenizer

VOCAB, PAGE_SIZE, CONTEXT = 157_184, 64, 131_072


@dataclass
class Timed:
    """µs of each measured step."""

    steps: list[float] = field(default_factory=list)  # whole, without the arithmetic of sampling
    binds: list[float] = field(default_factory=list)
    draws: list[float] = field(default_factory=list)


class NoEngine:
    """Binds a step as a TensorRT engine does and answers with logits that lie in memory already.

    A TensorRT engine's 614 tensors are bound when it is loaded; a captured step takes the eight bookkeeping inputs from
    where it was captured with them, so that a step writes those, in one copy, and binds nothing.
    """

    def __init__(self, batch: int, num_pages: int) -> None:
        self.config = ModelConfig.from_dict(FULL_CONFIG)
        self.page_size, self.num_pages, self.max_context = PAGE_SIZE, num_pages, CONTEXT
        limits = StepLimits(max(1024, batch), batch, CONTEXT, PAGE_SIZE, num_pages)
        self._buckets = Buckets(make_profiles(limits), batch, 0)
        self._device = open_device("cpu")
        self._stream = self._device.stream()
        largest = Padding(limits.max_tokens, batch, limits.pages_per_sequence, batch)
        self._arena = InputArena(self._device, InputLayout(largest).nbytes)
        for bucket in self._buckets.captured:
            self._arena.keep(layout_of(bucket.size))
        self.logits: Float32 = np.random.default_rng(0).standard_normal((batch, VOCAB), np.float32) * 3
        self.seconds = 0.0

    def forward(self, batch: Batch) -> Float32:
        begin = perf_counter()
        bucket, _ = self._buckets.choose(batch)
        self._arena.send(layout_of(bucket.size), batch, None, PAGE_SIZE, self._stream)
        self.seconds = perf_counter() - begin
        return self.logits[: batch.logit_indices.shape[0]]

    def close(self) -> None:
        """Nothing is held."""


class Drawn:
    """Samples in NumPy, or does what the host has to where a device samples, and answers with ids drawn before.

    That is: packing of what changes the logits, and the rules on the few largest logits that come back.
    """

    def __init__(self, on_host: bool) -> None:
        self._on_host, self._cpu = on_host, torch.device("cpu")
        self._ids = np.random.default_rng(1).integers(256, VOCAB - 1, 4096)
        self._next = 0
        self._tables: dict[int, Float32] = {}  # what a device gives back, by the number of rows
        self.seconds = 0.0

    def __call__(self, logits: Float32, requests: Sequence[Request]) -> Int64:
        count, params = len(requests), [request.params for request in requests]
        if not self._on_host and count not in self._tables:
            self._tables[count] = largest_of(torch.from_numpy(logits), RowRules.of(params, VOCAB)).numpy()
        begin = perf_counter()
        if self._on_host:
            ids = sample(logits, requests)
        else:
            pack_adjustments(logits.shape, range(count), requests, self._cpu)
            draw_each(candidates_of(self._tables[count], RowRules.of(params, VOCAB)), requests)
            self._next = (self._next + count) % 4000
            ids = self._ids[self._next : self._next + count]
        self.seconds = perf_counter() - begin
        return ids


def measure(batch: int, steps: int, prompt: int, on_host: bool) -> Timed:
    """Times decoding steps of `batch` requests after prompts of `prompt` tokens."""
    torch.set_num_threads(1)  # the copy that stands for the one to a device is not worth two
    limit = 2 * batch * (prompt // 512 + 1) + steps + 50  # tokens: the first decode while the last are computed
    pages = max(batch * (-(-(prompt + limit) // PAGE_SIZE) + 1), CONTEXT // PAGE_SIZE) + 1
    engine, draw = NoEngine(batch, pages), Drawn(on_host)
    llm = LLM.from_engine(engine, synthetic_tokenizer(), max_batch=batch)
    stepper = Stepper(engine, Limits(PAGE_SIZE, pages, CONTEXT, batch, max(1024, batch)), None, draw)
    rng = np.random.default_rng(2)
    outbox: deque[Delta] = deque()
    for index in range(batch):
        params = SamplingParams(
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
        ids = rng.integers(256, VOCAB - 1, prompt).tolist()
        stepper.add(llm.make_request(ids, params, outbox, index=index))
    while stepper.scheduler.waiting or any(request.computed < prompt for request in stepper.scheduler.running):
        stepper.step()
    for _ in range(20):
        stepper.step()
    assert len(stepper.scheduler.running) == batch
    found = Timed()
    for _ in range(steps):
        outbox.clear()
        begin = perf_counter()
        stepper.step()
        seconds = perf_counter() - begin
        found.steps.append(1e6 * (seconds - draw.seconds if on_host else seconds))
        found.binds.append(1e6 * engine.seconds)
        found.draws.append(1e6 * draw.seconds)
    return found


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
