"""POST /v1/chat/completions"""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import Request, Response

from angelforge.runtime.request import Delta, RequestOutput
from angelforge.runtime.sampling import SamplingParams
from angelforge.runtime.server.answer import Answer, respond
from angelforge.runtime.server.conversation import functions_to_call, render
from angelforge.runtime.server.errors import ApiError
from angelforge.runtime.server.grammar import Grammar, json_grammar, tool_call_grammar
from angelforge.runtime.server.host import Host, sampling_options
from angelforge.runtime.server.logprobs import chat_logprobs
from angelforge.runtime.server.schemas import ChatRequest
from angelforge.runtime.server.tools import BEGIN, Call, TaggedText, ToolCallParser
from angelforge.runtime.server.vocabulary import Vocabulary
from angelforge.runtime.tokenizer import Tokenizer


class Chats:
    """The endpoint."""

    def __init__(self, host: Host) -> None:
        self._host = host

    async def create(self, body: ChatRequest, request: Request) -> Response:
        """Answers one request, whole or as a stream."""
        host, options = self._host, self._host.options
        host.check_model(body.model)
        choices = body.n or 1
        host.check_choices(choices)
        functions, forced = functions_to_call(body)
        prompt = await host.encode(render(host.service.llm, body, functions), add_special_tokens=False)
        host.check_length(prompt, "messages")
        max_tokens = body.max_completion_tokens or body.max_tokens
        if max_tokens is None:  # the context ends it, or a cache that holds less than one context
            max_tokens = max(1, self._room() - prompt.shape[0])
        params = SamplingParams(
            max_tokens=max_tokens,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            **sampling_options(body),
        )
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs to be true.", "top_logprobs")
        schema = None if body.response_format is None else body.response_format.schema_to_fit
        grammar = None
        if forced:  # compiling takes up to a second, during which others are served
            source = tool_call_grammar(functions, special_tags=host.vocabulary.is_special(BEGIN))
            grammar = await asyncio.to_thread(Grammar, host.vocabulary, source, "tools")
        elif schema is not None:
            source = json_grammar(schema)
            grammar = await asyncio.to_thread(Grammar, host.vocabulary, source, "response_format")
        tokenizer = host.service.llm.tokenizer if functions else None
        answer = ChatAnswer(host.head("chatcmpl"), choices, body.include_usage, host.vocabulary, tokenizer, params)
        call = host.submit([prompt], choices, params, grammar)
        return await respond(request, call, answer, bool(body.stream), options.stall_seconds)

    def _room(self) -> int:
        llm = self._host.service.llm
        return min(llm.max_context, llm.stepper.scheduler.limits.cache_tokens)


class ChatAnswer(Answer):
    """Messages of the assistant, with calls of functions taken out of the text where there are functions."""

    whole, event = "chat.completion", "chat.completion.chunk"

    def __init__(
        self,
        head: dict[str, Any],
        choices: int,
        include_usage: bool,
        vocabulary: Vocabulary,
        tokenizer: Tokenizer | None,
        params: SamplingParams,
    ) -> None:
        """`tokenizer` is given where there are functions to call."""
        super().__init__(head, choices, include_usage)
        self._vocabulary, self._tokenizer, self._stops = vocabulary, tokenizer, params.stop
        self._logprobs = params.logprobs is not None
        self._readers: dict[int, tuple[TaggedText, ToolCallParser]] = {}
        self._calls: dict[int, int] = {}  # of each choice, how many have been told

    def choice(self, index: int, output: RequestOutput) -> dict[str, Any]:
        """A whole choice."""
        content, calls = self._read(index, output.text, output.token_ids, last=True)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message |= {"content": content or None, "tool_calls": [call.to_dict() for call in calls]}
        return {
            "index": index,
            "message": message,
            "logprobs": chat_logprobs(self._vocabulary, output.logprobs or ()) if self._logprobs else None,
            "finish_reason": "tool_calls" if calls and output.finish_reason == "stop" else output.finish_reason,
        }

    def opening(self, index: int) -> list[dict[str, Any]]:
        """The role."""
        return [self._piece(index, {"role": "assistant", "content": ""})]

    def pieces(self, delta: Delta) -> list[dict[str, Any]]:
        """Content and calls as soon as they are certain; a call is told at once, with all its arguments."""
        index = delta.index
        content, calls = self._read(index, delta.text, delta.token_ids, last=delta.output is not None)
        change: dict[str, Any] = {"content": content} if content else {}
        if calls:
            told = self._calls.get(index, 0)
            change["tool_calls"] = [{"index": told + place, **call.to_dict()} for place, call in enumerate(calls)]
            self._calls[index] = told + len(calls)
        logprobs = None
        if self._logprobs and delta.token_ids:
            logprobs = chat_logprobs(self._vocabulary, delta.logprobs or ())
        pieces = [self._piece(index, change, logprobs)] if change or logprobs else []
        if delta.output is not None:
            reason = delta.output.finish_reason
            called = reason == "stop" and self._calls.get(index, 0) > 0
            pieces.append(self._piece(index, {}, reason="tool_calls" if called else reason))
        return pieces

    def _read(self, index: int, text: str, tokens: tuple[int, ...], last: bool) -> tuple[str, list[Call]]:
        """(content, calls) of the next part of a choice."""
        if self._tokenizer is None:
            return text, []
        if index not in self._readers:
            self._readers[index] = TaggedText(self._tokenizer, self._stops), ToolCallParser()
        tagged, parser = self._readers[index]
        content, calls = parser.push(tagged.push(tokens) + (tagged.finish() if last else ""))
        return content + (parser.finish() if last else ""), calls

    @staticmethod
    def _piece(
        index: int, change: dict[str, Any], logprobs: dict[str, Any] | None = None, reason: str | None = None
    ) -> dict[str, Any]:
        return {"index": index, "delta": change, "logprobs": logprobs, "finish_reason": reason}
