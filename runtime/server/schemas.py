"""The bodies of requests. Fields that are not listed are refused, as OpenAI does; docs/serving.md lists all."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, field_validator, model_validator

Token = Annotated[int, Field(strict=True, ge=0)]
TokenList = list[Token]
Stop = str | list[str] | None

_LONGEST_STOP = 4096  # characters: a longer one could keep the engine's thread searching for seconds


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StreamOptions(_Body):
    """What a stream tells beside text."""

    include_usage: StrictBool = False
    include_obfuscation: StrictBool | None = None  # taken and ignored: texts are not padded


class Sampling(_Body):
    """What both endpoints take, and what is taken and has no effect here."""

    model: str
    temperature: StrictFloat | None = None
    top_p: StrictFloat | None = None
    n: Annotated[int, Field(strict=True, ge=1)] | None = None
    seed: StrictInt | None = None
    stop: Stop = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: Annotated[StrictFloat, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[StrictFloat, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, StrictFloat] | None = None
    # Beyond OpenAI's, with the meaning that they have in SamplingParams.
    top_k: StrictInt | None = None
    min_p: StrictFloat | None = None
    repetition_penalty: StrictFloat | None = None
    stop_token_ids: TokenList | None = None
    ignore_eos: StrictBool | None = None
    # For the operators of other services.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: StrictBool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the counts of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    @field_validator("stop")
    @classmethod
    def _few(cls, stop: Stop) -> Stop:
        if isinstance(stop, list) and len(stop) > 16:
            raise ValueError(f"{len(stop)} stop strings, but at most 16 are allowed")
        if (longest := max(map(len, [stop] if isinstance(stop, str) else stop or ()), default=0)) > _LONGEST_STOP:
            raise ValueError(f"a stop string of {longest} characters, but at most {_LONGEST_STOP} are allowed")
        return stop

    @field_validator("logit_bias")
    @classmethod
    def _ids(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        for token, value in (bias or {}).items():
            if not (token.isascii() and token.isdigit() and len(token) < 10) or not -100 <= value <= 100:
                raise ValueError("token ids with numbers from -100 to 100 are expected")
        return bias


class CompletionRequest(Sampling):
    """POST /v1/completions"""

    prompt: str | TokenList | list[str] | list[TokenList]
    max_tokens: Annotated[int, Field(strict=True, ge=0)] | None = None
    logprobs: Annotated[int, Field(strict=True, ge=0, le=20)] | None = None
    echo: StrictBool | None = None
    best_of: StrictInt | None = None
    suffix: None = None
    return_token_ids: StrictBool | None = None  # beyond OpenAI's: `token_ids` in every choice


class Message(BaseModel):
    """A message of a conversation; what else it has goes to the checkpoint's template."""

    model_config = ConfigDict(extra="allow")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    tool_calls: list[ToolCall] | None = None


class TextPart(_Body):
    """The only kind of content that a text model takes."""

    type: Literal["text"]
    text: str


class FunctionCall(_Body):
    """A call that the model has made: arguments are JSON in a text."""

    name: str
    arguments: str = "{}"


class ToolCall(BaseModel):
    """A call in a message of the assistant."""

    model_config = ConfigDict(extra="ignore")
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Function(_Body):
    """What the model may call; parameters are a JSON schema."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None


class Tool(_Body):
    """A function is the only kind of tool."""

    type: Literal["function"]
    function: Function


class NamedFunction(_Body):
    """A function by its name."""

    name: str


class NamedTool(_Body):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(BaseModel):
    """A schema that the answer must fit."""

    model_config = ConfigDict(extra="ignore", populate_by_name=True)
    name: str | None = None
    definition: dict[str, Any] | None = Field(default=None, alias="schema")


class ResponseFormat(_Body):
    """text, any JSON object, or JSON that fits a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _complete(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to the type json_schema, and only to that")
        if self.json_schema is not None and self.json_schema.definition is None:
            raise ValueError("json_schema has no schema; for any JSON object use the type json_object")
        return self

    @property
    def schema_to_fit(self) -> dict[str, Any] | None:
        """The schema of the answer, None for text."""
        if self.json_schema is not None:
            return self.json_schema.definition
        return {"type": "object"} if self.type == "json_object" else None


class ChatRequest(Sampling):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(strict=True, ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(strict=True, ge=1)] | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[int, Field(strict=True, ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: StrictBool | None = None
    modalities: list[Literal["text"]] | None = None
    reasoning_effort: None = None
