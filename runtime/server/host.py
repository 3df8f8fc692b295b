"""What all endpoints share: the service, the model's name and words, and how a request becomes work."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from time import time
from typing import Any

import numpy as np

from angelforge.errors import AngelForgeError
from angelforge.runtime.batch import Int64
from angelforge.runtime.call import Call, Work
from angelforge.runtime.request import Delta, RequestOutput
from angelforge.runtime.sampling import SamplingParams
from angelforge.runtime.server.errors import ApiError
from angelforge.runtime.server.grammar import Grammar
from angelforge.runtime.server.options import ServerOptions
from angelforge.runtime.server.schemas import Sampling
from angelforge.runtime.server.vocabulary import Vocabulary
from angelforge.runtime.service import Service

_LONG = 8192  # characters from which on a text is tokenized in a thread: the loop would stand still meanwhile
_CHARACTERS_A_TOKEN = 16  # no text has tokens of so many characters on average: longer ones are not tokenized at all


@dataclass(frozen=True, eq=False)
class Host:
    """One model behind the endpoints."""

    service: Service
    options: ServerOptions
    vocabulary: Vocabulary
    created: int = field(default_factory=lambda: int(time()))
    _tokenizing: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))  # long texts, one by one

    def check_model(self, name: str) -> None:
        """Raises ApiError (404) for another model."""
        if name != self.options.model:
            message = f"The model {name!r} does not exist. This server has {self.options.model!r}."
            raise ApiError(404, message, "model", "model_not_found")

    async def encode(self, text: str, add_special_tokens: bool = True) -> Int64:
        """Token ids of a text, int64 [n]. Raises ApiError (400) without a tokenizer, and for what is no text."""
        tokenizer = self.service.llm.tokenizer
        if tokenizer is None:
            raise ApiError(400, "The bundle has no tokenizer: prompts have to be token ids.", "prompt")
        most = _CHARACTERS_A_TOKEN * self.service.llm.max_context + _LONG
        if len(text) > most:  # tokenizing takes a second and 200 MB for 1 MB
            message = f"The prompt has {len(text)} characters, and the context of this model holds {most} at most."
            raise ApiError(400, message, "prompt", "context_length_exceeded")
        try:
            if len(text) < _LONG:
                return np.array(tokenizer.encode(text, add_special_tokens), np.int64)
            async with self._tokenizing:
                return np.array(await asyncio.to_thread(tokenizer.encode, text, add_special_tokens), np.int64)
        except AngelForgeError as error:
            raise ApiError(400, str(error), "prompt") from None

    def check_length(self, ids: Int64, param: str) -> None:
        """Raises ApiError (400) for a prompt that is longer than the context."""
        most = self.service.llm.max_context
        if ids.shape[0] > most:
            message = f"The prompt has {ids.shape[0]} tokens, but the context of this model is {most}. Shorten it."
            raise ApiError(400, message, param, "context_length_exceeded")

    def check_choices(self, count: int) -> None:
        """Raises ApiError (400) for more choices of one prompt than are allowed."""
        if count > self.options.max_choices:
            raise ApiError(400, f"n is {count}, but at most {self.options.max_choices} choices are allowed.", "n")

    def head(self, kind: str) -> dict[str, Any]:
        """What every object of a new answer has; its id begins with `kind`."""
        return {"id": f"{kind}-{secrets.token_hex(12)}", "created": int(time()), "model": self.options.model}

    def submit(
        self, prompts: Sequence[Int64], choices: int, params: SamplingParams, grammar: Grammar | None = None
    ) -> Call:
        """`choices` requests for each prompt, seeds counted up; indices go over the choices of the first, and so on."""
        work = []
        for prompt in prompts:
            for choice in range(choices):
                seed = None if params.seed is None else params.seed + choice
                constraint = None if grammar is None else grammar.start()
                work.append(Work(prompt, replace(params, seed=seed), constraint))
        return self.service.submit(work)


def sampling_options(body: Sampling) -> dict[str, Any]:
    """The fields of SamplingParams that both endpoints fill alike. Temperature is 1 unless given, as OpenAI has it."""
    return {
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "top_k": max(body.top_k or 0, 0),  # -1 means all in other servers
        "min_p": body.min_p or 0.0,
        "repetition_penalty": 1.0 if body.repetition_penalty is None else body.repetition_penalty,
        "presence_penalty": body.presence_penalty or 0.0,
        "frequency_penalty": body.frequency_penalty or 0.0,
        "logit_bias": {int(token): bias for token, bias in (body.logit_bias or {}).items()},
        "seed": None if body.seed is None else body.seed % 2**62,
        "stop": () if body.stop is None else body.stop,
        "stop_token_ids": tuple(body.stop_token_ids or ()),
        "ignore_eos": bool(body.ignore_eos),
    }


async def first_deltas(call: Call) -> list[Delta]:
    """What comes first; raises ApiError if that is a failure, while there still can be a status for it."""
    deltas = await call.next()
    for delta in deltas:
        raise_failure(call, delta.output)
    return deltas


async def all_outputs(call: Call) -> list[RequestOutput]:
    """The outputs of all requests in their order; raises ApiError for the first that fails."""
    outputs: dict[int, RequestOutput] = {}
    while deltas := await call.next():
        for delta in deltas:
            raise_failure(call, delta.output)
            if delta.output is not None:
                outputs[delta.index] = delta.output
    return [outputs[index] for index in range(len(call.requests))]


def raise_failure(call: Call, output: RequestOutput | None) -> None:
    """Raises ApiError for an output that failed: 400 if it never could run, 503 at a shutdown, else 500."""
    if output is not None and output.error is not None:
        raise ApiError({"refused": 400, "stopped": 503, None: 500}[call.fault], output.error)


def usage(outputs: Sequence[RequestOutput], choices: int) -> dict[str, Any]:
    """Token counts; a prompt counts once, however many choices it has."""
    prompt = sum(len(output.prompt_token_ids) for output in outputs[::choices])
    completion = sum(len(output.token_ids) for output in outputs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(output.cached_tokens for output in outputs[::choices])},
    }
