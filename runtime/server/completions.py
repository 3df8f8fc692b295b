"""POST /v1/completions"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from fastapi import Request, Response

from angelforge.runtime.batch import Int64
from angelforge.runtime.request import Delta, RequestOutput, TokenLogprob
from angelforge.runtime.sampling import SamplingParams
from angelforge.runtime.server.answer import Answer, respond
from angelforge.runtime.server.errors import ApiError
from angelforge.runtime.server.host import Host, sampling_options
from angelforge.runtime.server.logprobs import CompletionLogprobs
from angelforge.runtime.server.schemas import CompletionRequest
from angelforge.runtime.server.vocabulary import Vocabulary


class Completions:
    """The endpoint."""

    def __init__(self, host: Host) -> None:
        self._host = host

    async def create(self, body: CompletionRequest, request: Request) -> Response:
        """Answers one request, whole or as a stream."""
        host, options = self._host, self._host.options
        host.check_model(body.model)
        choices = body.n or 1
        host.check_choices(choices)
        if body.best_of not in (None, choices):
            raise ApiError(400, f"best_of is {body.best_of}, but only the value of n is supported.", "best_of")
        if body.stream and body.echo and body.logprobs is not None:
            raise ApiError(400, "echo with logprobs cannot be streamed.", "stream")
        prompts = await self._prompts(body)
        params = self._params(body)
        echo = self._texts(body, prompts) if body.echo else None
        ids = bool(body.return_token_ids)
        answer = TextAnswer(host.head("cmpl"), choices, body.include_usage, host.vocabulary, echo, body.logprobs, ids)
        call = host.submit(prompts, choices, params)
        return await respond(request, call, answer, bool(body.stream), options.stall_seconds)

    def _params(self, body: CompletionRequest) -> SamplingParams:
        max_tokens = self._host.options.max_tokens if body.max_tokens is None else body.max_tokens
        prompt_logprobs = body.logprobs if body.echo else None
        if max_tokens == 0 and prompt_logprobs is None:
            prompt_logprobs = 0  # the engine generates nothing only where it is asked about the prompt
        return SamplingParams(
            max_tokens=max_tokens, logprobs=body.logprobs, prompt_logprobs=prompt_logprobs, **sampling_options(body)
        )

    async def _prompts(self, body: CompletionRequest) -> list[Int64]:
        """The prompts as ids, int64 [n] each."""
        given, most = body.prompt, self._host.options.max_requests
        each: Sequence[Any] = given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]
        if len(each) * (body.n or 1) > most:  # told before all of them are tokenized
            raise ApiError(400, f"{len(each)} prompts of n choices, but {most} in all may be open at once.", "prompt")
        prompts = [await self._host.encode(one) if isinstance(one, str) else _ids(one) for one in each]
        for prompt in prompts:
            self._host.check_length(prompt, "prompt")
        return prompts

    def _texts(self, body: CompletionRequest, prompts: list[Int64]) -> list[str]:
        """The prompts as texts, those that are ids as far as they have one."""
        if isinstance(body.prompt, str):
            return [body.prompt]
        if body.prompt and isinstance(body.prompt[0], str):
            return [str(text) for text in body.prompt]
        tokenizer = self._host.service.llm.tokenizer
        return ["" if tokenizer is None else tokenizer.decode(prompt.tolist()) for prompt in prompts]


class TextAnswer(Answer):
    """Texts, with the prompt before them where it is echoed."""

    whole = event = "text_completion"

    def __init__(
        self,
        head: dict[str, Any],
        choices: int,
        include_usage: bool,
        vocabulary: Vocabulary,
        echo: list[str] | None,
        logprobs: int | None,
        ids: bool,
    ) -> None:
        """`echo` are the prompts' texts; of `logprobs` as many are shown beside each token; `ids` shows their ids."""
        super().__init__(head, choices, include_usage)
        self._vocabulary, self._echo, self._logprobs, self._ids = vocabulary, echo, logprobs, ids
        self._columns: dict[int, CompletionLogprobs] = {}

    def choice(self, index: int, output: RequestOutput) -> dict[str, Any]:
        """A whole choice."""
        text, tokens = output.text, output.token_ids
        logprobs: list[TokenLogprob | None] = list(output.logprobs or ())
        if self._echo is not None:
            text = self._echo[index // self._choices] + text
            tokens = output.prompt_token_ids + tokens
            logprobs = [*(output.prompt_logprobs or ()), *logprobs]
        columns = None if self._logprobs is None else self._of(index).columns(tokens, logprobs)
        return self._piece(index, text, columns, output.finish_reason, output.token_ids)

    def opening(self, index: int) -> list[dict[str, Any]]:
        """The prompt."""
        return [] if self._echo is None else [self._piece(index, self._echo[index // self._choices], None, None, ())]

    def pieces(self, delta: Delta) -> list[dict[str, Any]]:
        """Text as soon as it is certain, and logprobs of each token as soon as it is chosen."""
        reason = None if delta.output is None else delta.output.finish_reason
        columns = None
        if self._logprobs is not None:
            columns = self._of(delta.index).columns(delta.token_ids, delta.logprobs or ())
        if not delta.text and reason is None and not (delta.token_ids and (self._ids or columns is not None)):
            return []
        return [self._piece(delta.index, delta.text, columns, reason, delta.token_ids)]

    def _piece(
        self, index: int, text: str, logprobs: dict[str, Any] | None, reason: str | None, ids: tuple[int, ...]
    ) -> dict[str, Any]:
        piece = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return {**piece, "token_ids": list(ids)} if self._ids else piece

    def _of(self, index: int) -> CompletionLogprobs:
        return self._columns.setdefault(index, CompletionLogprobs(self._vocabulary, self._logprobs or 0))


def _ids(tokens: Sequence[int]) -> Int64:
    if any(token >= 2**63 for token in tokens):
        raise ApiError(400, "The prompt has a token id of more than 64 bits, which no vocabulary has.", "prompt")
    return np.array(tokens, np.int64)
