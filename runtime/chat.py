"""Chats as prompts: the checkpoint's own template, rendered where it can do no harm."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from angelforge.config_json import read_json_object
from angelforge.errors import AngelForgeError, UsageError

Message = Mapping[str, Any]  # {"role": "system" | "user" | "assistant" | …, "content": text}

# What a template can run into with data it was not written for. Its own complaints are TemplateErrors.
_TEMPLATE_FAULTS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


class ChatTemplate:
    """A Jinja chat template as Hugging Face checkpoints carry it, with the surroundings that Transformers gives it.

    It sees `messages`, `add_generation_prompt`, `tools`, `documents` and the special tokens (`bos_token`, …); the
    sandbox keeps it from attributes and methods that reach further or change its input.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], origin: str = "the chat template") -> None:
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._origin = origin
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
            #: Whether it tells the model of `tools`.
            self.takes_tools = "tools" in meta.find_undeclared_variables(environment.parse(source))
        except (jinja2.TemplateError, RecursionError) as error:
            raise AngelForgeError(f"{origin} is not a valid Jinja template: {_describe(error)}") from None

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate | None:
        """The template of a bundle or checkpoint, None if it has none.

        Looks at `chat_template.jinja`, `chat_template.json`, then `tokenizer_config.json` (of several named templates
        the one called "default"). Raises AngelForgeError for a file that cannot be read as such.
        """
        settings_file = folder / "tokenizer_config.json"
        settings = read_json_object(settings_file) if settings_file.is_file() else {}
        special_tokens = {key: text for key, value in settings.items() if (text := _token_text(key, value)) is not None}
        jinja_file, json_file = folder / "chat_template.jinja", folder / "chat_template.json"
        if jinja_file.is_file():
            try:
                return cls(jinja_file.read_text(encoding="utf-8"), special_tokens, str(jinja_file))
            except (OSError, UnicodeDecodeError) as error:
                raise AngelForgeError(f"{jinja_file} cannot be read: {error}.") from None
        for file, found in ((json_file, None), (settings_file, settings)):
            if found is None and not file.is_file():
                continue
            value = (read_json_object(file) if found is None else found).get("chat_template")
            if value is not None:
                return cls(_default_template(value, file), special_tokens, f"The chat template in {file}")
        return None

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The prompt for a conversation; `add_generation_prompt` opens the assistant's turn at the end.

        `tools` are what the model may call: {"type": "function", "function": {"name": …, "parameters": schema}}.
        Raises UsageError if the messages are malformed, AngelForgeError if the template refuses them.
        """
        conversation = [_checked(index, message) for index, message in enumerate(messages)]
        if not conversation:
            raise UsageError("The chat has no messages, but at least one is needed.")
        try:
            return self._template.render(
                self._special_tokens,
                messages=conversation,
                add_generation_prompt=add_generation_prompt,
                tools=None if tools is None else list(tools),
                documents=None,
            )
        except _TEMPLATE_FAULTS as error:
            raise AngelForgeError(f"{self._origin} refuses these messages: {_describe(error)}") from None


class _Generation(Extension):
    """`{% generation %}` … `{% endgeneration %}`: marks an assistant's words for training, and changes nothing here."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own interface

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The statements between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _token_text(key: str, value: object) -> str | None:
    """The text of a special token in tokenizer_config.json: a string, or an object with its text as `content`."""
    if not key.endswith("_token"):
        return None
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _default_template(value: object, file: Path) -> str:
    if isinstance(value, list):  # several templates: [{"name": …, "template": …}, …]
        named = {
            item["name"]: item["template"]
            for item in value
            if isinstance(item, dict) and {"name", "template"} <= {*item}
        }
        value = named.get("default")
    if not isinstance(value, str):
        raise AngelForgeError(f'{file}: chat_template is neither a text nor a list with a template named "default".')
    return value


def _checked(index: int, message: Message) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise UsageError(f"Message {index} of the chat is a {type(message).__name__}, but an object was expected.")
    if not isinstance(message.get("role"), str) or "content" not in message:
        raise UsageError(
            f"Message {index} of the chat needs a text `role` and a `content`; it has {sorted(map(str, message))}."
        )
    return dict(message)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(style: str) -> str:
    return datetime.datetime.now().strftime(style)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML, which a model should not read.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _describe(error: Exception) -> str:
    line = f" (line {error.lineno})" if isinstance(error, jinja2.TemplateSyntaxError) else ""
    return f"{str(error).rstrip('.') or type(error).__name__}{line}."
