"""`LLM`: text and token ids in, text and token ids out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from angelforge.bundle import Bundle
from angelforge.errors import AngelForgeError, UsageError
from angelforge.runtime.batch import Float32, Int64
from angelforge.runtime.chat import ChatTemplate, Message
from angelforge.runtime.constraint import Constraint
from angelforge.runtime.depth import Depth
from angelforge.runtime.detokenizer import TextStream
from angelforge.runtime.engines import DraftEngine, Engine, load_draft, load_engine
from angelforge.runtime.group import Group, refuse_stray_ranks
from angelforge.runtime.limits import Limits
from angelforge.runtime.packing import Piece, pack
from angelforge.runtime.pages import Lease
from angelforge.runtime.prompts import Prompt, encode_prompt
from angelforge.runtime.request import Delta, Request, RequestOutput, Timings
from angelforge.runtime.sampling import SamplingParams
from angelforge.runtime.speculation import Speculator
from angelforge.runtime.stepper import Stepper
from angelforge.runtime.tally import SpeculationReport
from angelforge.runtime.tokenizer import Tokenizer
from angelforge.targets import get_target

_SCORE_ROWS = 256  # rows of logits computed at once by `score`: 161 MB with the largest vocabulary


class LLM:
    """A model that is loaded and ready. Use it from one thread, and `close` it or use it in a `with` statement."""

    def __init__(
        self,
        bundle: str | Path,
        target: str = "cpu",
        *,
        num_pages: int | None = None,
        kv_memory: int | None = None,
        max_batch: int = 32,
        max_tokens_per_step: int = 1024,
        threads: int | None = None,
        speculate: Depth = "auto",
        tensor_parallel: int = 1,
        cuda_graphs: bool = True,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Loads a bundle's engine for a target.

        The KV cache has `num_pages` pages or takes `kv_memory` bytes; by default what `max_batch` full contexts need,
        at most a quarter of the free memory, or with TensorRT what the weights leave. A step computes up to
        `max_tokens_per_step` tokens of up to `max_batch` requests; an engine that was built for fewer tokens gets
        fewer. `threads` is for CPUs; by default all cores. `speculate` is how many tokens the bundle's draft proposes
        at a time, which makes outputs faster and never different in distribution: a number, 0 for none, or "auto", as
        many as each request's acceptance makes worth it (none without a draft). With `tensor_parallel` N, torchrun
        starts N processes that share the model and all create this: rank 0 goes on, the others never return from here;
        they work for it until it closes and then end. Without `cuda_graphs` a GPU's decoding steps are launched one
        kernel after another: slower, for finding faults. `progress` is told bytes done and in all while weights go to a
        GPU. Raises AngelForgeError if anything is missing or does not fit.
        """
        opened = Bundle.open(Path(bundle))
        tokenizer, template = Tokenizer.load(opened.folder), ChatTemplate.load(opened.folder)
        drafting = speculate != 0 and (speculate != "auto" or opened.manifest.draft is not None)
        refuse_stray_ranks(tensor_parallel)
        get_target(target).check_ranks(tensor_parallel)
        group = None if tensor_parallel == 1 else Group.join(tensor_parallel, get_target(target).device)
        engine = load_engine(
            opened,
            target,
            num_pages=num_pages,
            kv_memory=kv_memory,
            max_batch=max_batch,
            threads=threads,
            draft=drafting,
            group=group,
            cuda_graphs=cuda_graphs,
            progress=progress,
        )
        try:
            draft = load_draft(opened, target, engine, threads=threads) if drafting else None
            tokens = min(max_tokens_per_step, getattr(engine, "max_tokens", max_tokens_per_step))
            self._start(engine, tokenizer, template, max_batch, tokens, draft, speculate)
        except AngelForgeError:
            engine.close()  # which lets other ranks go
            raise

    @classmethod
    def from_engine(
        cls,
        engine: Engine,
        tokenizer: Tokenizer | None = None,
        template: ChatTemplate | None = None,
        *,
        max_batch: int = 32,
        max_tokens_per_step: int = 1024,
        draft: DraftEngine | None = None,
        speculate: Depth = "auto",
    ) -> LLM:
        """Around an engine that is loaded already, with or without a draft beside it; `close` closes them."""
        llm = cls.__new__(cls)
        llm._start(engine, tokenizer, template, max_batch, max_tokens_per_step, draft, speculate)
        return llm

    def _start(
        self,
        engine: Engine,
        tokenizer: Tokenizer | None,
        template: ChatTemplate | None,
        max_batch: int,
        max_tokens_per_step: int,
        draft: DraftEngine | None,
        speculate: Depth,
    ) -> None:
        self._engine: Engine | None = engine
        self._draft = draft
        self.tokenizer = tokenizer
        self.template = template
        self.config = engine.config
        self.max_context = engine.max_context
        self._limits = Limits(
            engine.page_size,
            engine.num_pages,
            engine.max_context,
            max_batch,
            max_tokens_per_step,
            getattr(engine, "max_rows", None),  # of those that have such a limit
        )
        self._speculator = None
        if draft is not None and speculate != 0:
            self._speculator = Speculator(draft, self._limits, speculate)
        self.stepper = Stepper(engine, self._limits, self._speculator)

    @property
    def speculation(self) -> SpeculationReport | None:
        """What the draft has done so far for all requests together, None without one."""
        return None if self._speculator is None else self._speculator.total.report()

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """One output for each prompt (text or token ids), in their order; `params` for all or one each.

        A prompt that cannot be run (empty, longer than the context, an id out of range) gives an output with finish
        reason "error" and a message in `error`; the others are unharmed. An output ends at the end of the context at
        the latest, with finish reason "length".
        """
        outputs: dict[int, RequestOutput] = {}
        for delta in self.stream(prompts, params):
            if delta.output is not None:
                outputs[delta.index] = delta.output
        return [outputs[index] for index in range(len(prompts))]

    def stream(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Iterator[Delta]:
        """What `generate` gives, as it comes: the prompts' deltas mixed, the last of each with its output.

        Closing the iterator cancels what has not finished.
        """
        if isinstance(prompts, str) or not isinstance(prompts, Sequence):
            raise UsageError(
                f"prompts is a {type(prompts).__name__}, but a list of texts or of lists of ids was expected."
            )
        each = [params or SamplingParams()] * len(prompts) if not isinstance(params, Sequence) else list(params)
        if len(each) != len(prompts) or not all(isinstance(one, SamplingParams) for one in each):
            raise UsageError(f"params must be one SamplingParams or a list of {len(prompts)}, one for each prompt.")
        return self._stream(prompts, each)

    def chat(self, messages: Sequence[Message], params: SamplingParams | None = None) -> RequestOutput:
        """The model's answer to a conversation: [{"role": "user", "content": "…"}, …].

        Raises AngelForgeError if it cannot be run. To stream: `stream([llm.chat_prompt(messages)])`.
        """
        (output,) = self.generate([self.chat_prompt(messages)], params)
        if output.error is not None:
            raise AngelForgeError(output.error)
        return output

    def chat_prompt(self, messages: Sequence[Message]) -> list[int]:
        """The token ids of a conversation in the checkpoint's own chat format, the assistant's turn opened."""
        if self.template is None or self.tokenizer is None:
            what = "tokenizer" if self.tokenizer is None else "chat template"
            raise UsageError(f"The bundle has no {what}, so it cannot chat. Use prompts instead.")
        # The template writes begin tokens itself.
        return self.tokenizer.encode(self.template.render(messages), add_special_tokens=False)

    def make_request(
        self,
        prompt: Prompt,
        params: SamplingParams,
        outbox: deque[Delta],
        *,
        index: int = 0,
        constraint: Constraint | None = None,
    ) -> Request:
        """A request for `Stepper.add`, whose deltas come to `outbox` with this `index`; nothing of it runs yet.

        It may be called from any thread. Raises AngelForgeError where it could not be run.
        """
        ids = encode_prompt(prompt, self.tokenizer, self.config.vocab_size, self.max_context)
        params.bias.check(self.config.vocab_size)
        end_ids = set(params.stop_token_ids)
        if not params.ignore_eos:
            end_ids.update(self.config.eos_token_ids)
        text = None
        if self.tokenizer is not None:
            # Special tokens are not part of the text: one that is given as a stop string is found by its id.
            special_ids = map(self.tokenizer.special_id, params.stop)
            end_ids.update(token for token in special_ids if token is not None)
            text = TextStream(self.tokenizer, params.stop)
        elif params.stop:
            raise UsageError("Stop strings were given, but the bundle has no tokenizer.json. Use stop_token_ids.")
        # The token after the last position of the context can be chosen, but not computed on.
        max_length = min(ids.shape[0] + params.max_tokens, self.max_context + 1)
        request = Request(index, ids, params, max_length, outbox, frozenset(end_ids), text, constraint)
        self.stepper.scheduler.check(request)
        return request

    def score(self, prompt: Prompt) -> Float32:
        """The logits at every position of a prompt, f32 [n, vocab]. Raises AngelForgeError if it cannot be run."""
        return np.concatenate([piece.copy() for piece in self.score_pieces(prompt)])

    def score_pieces(self, prompt: Prompt) -> Iterator[Float32]:
        """What `score` gives in pieces f32 [≤ 256, vocab], each valid until the next is asked for."""
        ids = encode_prompt(prompt, self.tokenizer, self.config.vocab_size, self.max_context)
        return self._score(ids)

    def close(self) -> None:
        """Frees the engines; closing twice is fine."""
        if self._draft is not None:
            self._draft.close()
            self._draft = None
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _stream(self, prompts: Sequence[Prompt], params: list[SamplingParams]) -> Iterator[Delta]:
        outbox: deque[Delta] = deque()
        requests = []
        try:
            for index, prompt in enumerate(prompts):
                try:
                    request = self.make_request(prompt, params[index], outbox, index=index)
                    self.stepper.add(request)
                    requests.append(request)
                except AngelForgeError as error:
                    refusal = RequestOutput("", (), (), "error", str(error), Timings(None, 0.0))
                    outbox.append(Delta(index, "", (), refusal))
            left = len(prompts)
            while left:
                while outbox:
                    delta = outbox.popleft()
                    left -= delta.output is not None
                    yield delta
                if left and self._open() and not self.stepper.step():
                    raise AngelForgeError("The KV cache is in use by a `score_pieces` that was not finished or closed.")
        finally:
            for request in requests:
                if not request.finished:
                    self.stepper.end(request)

    def _score(self, ids: Int64) -> Iterator[Float32]:
        limits, pool = self._limits, self.stepper.scheduler.pool
        engine = self._open()
        lease = Lease(pool, limits.pages_for(ids.shape[0]))
        if not lease.grow(limits.pages_for(ids.shape[0])):
            free = pool.free * limits.page_size
            raise UsageError(
                f"The prompt has {ids.shape[0]} tokens, but the KV cache has room for {free}. Give it more memory."
            )
        rows = min(_SCORE_ROWS, limits.max_tokens_per_step)
        try:
            for begin in range(0, ids.shape[0], rows):
                tokens = ids[begin : begin + rows]
                batch = pack([Piece(tokens, begin, lease.pages, tokens.shape[0])], limits.page_size)
                yield _on_host(engine.forward(batch))
        finally:
            lease.release()

    def _open(self) -> Engine:
        if self._engine is None:
            raise UsageError("This LLM is closed. Load the bundle again.")
        return self._engine


def _on_host(logits: Any) -> Float32:
    """Logits of any engine as a NumPy array."""
    if isinstance(logits, np.ndarray):
        return logits
    from angelforge.runtime.device import to_host  # needs torch

    values: Float32 = to_host(logits)
    return values
