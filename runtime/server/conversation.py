"""Messages of the API as the checkpoint's chat template takes them."""

from __future__ import annotations

import json
from typing import Any

from angelforge.errors import AngelForgeError
from angelforge.runtime.llm import LLM
from angelforge.runtime.server.errors import ApiError
from angelforge.runtime.server.schemas import ChatRequest, Function, Message, NamedTool
from angelforge.runtime.server.tools import BEGIN


def functions_to_call(body: ChatRequest) -> tuple[list[Function], bool]:
    """(the functions that the model may call, whether it must). Raises ApiError (400) for a choice without tools."""
    functions = [tool.function for tool in body.tools or []]
    choice = body.tool_choice
    if choice is None or choice == "auto":
        return functions, False
    if choice == "none":
        return [], False
    if isinstance(choice, NamedTool):
        functions = [function for function in functions if function.name == choice.function.name]
    if not functions:
        raise ApiError(400, "tool_choice asks for a call of a function that tools do not have.", "tool_choice")
    return functions, True


def render(llm: LLM, body: ChatRequest, functions: list[Function]) -> str:
    """The prompt of a conversation. Raises ApiError (400) if there is no template, or it refuses the messages."""
    template, tokenizer = llm.template, llm.tokenizer
    if template is None or tokenizer is None:
        lacking = "tokenizer" if tokenizer is None else "chat template"
        raise ApiError(400, f"The bundle has no {lacking}, so it cannot chat. Use /v1/completions.", "messages")
    if functions and (not template.takes_tools or BEGIN not in template.source):
        message = f"The chat template of this model does not define tool calls between {BEGIN} tags."
        raise ApiError(400, message, "tools")
    # The model is told of all tools, even where it must call a certain one.
    tools = [tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in body.tools or []]
    try:
        return template.render(list(map(_plain, body.messages)), tools=tools if functions else None)
    except AngelForgeError as error:
        raise ApiError(400, str(error), "messages") from None


def _plain(message: Message) -> dict[str, Any]:
    """A message as templates expect it: one text, and arguments of calls as objects."""
    plain = message.model_dump(exclude_none=True)
    content = message.content
    plain["content"] = "".join(part.text for part in content) if isinstance(content, list) else content or ""
    if message.role == "developer":  # the newer name of the same
        plain["role"] = "system"
    for call in plain.get("tool_calls", []):
        call["function"]["arguments"] = _parsed(call["function"]["arguments"])
    return plain


def _parsed(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
