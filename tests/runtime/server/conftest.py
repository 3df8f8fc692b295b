"""The toy behind a server, once for all tests of a process."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.http_server import Running, build_toy, served

from angelforge.runtime.llm import LLM

# As Ling's templates tell a model of its tools, and as they write calls and answers.
TOOL_TEMPLATE = """\
{%- if tools -%}<role>SYSTEM</role># Tools
{%- for tool in tools %}
{{ tool.function | tojson }}
{%- endfor %}
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call><|role_end|>{%- endif -%}
{%- for message in messages -%}
{{- '<role>' ~ ('HUMAN' if message.role == 'user' else message.role | upper) ~ '</role>' ~ message.content -}}
{%- for call in message.tool_calls or [] -%}
{{- '<tool_call>\\n{"name": "' ~ call.function.name ~ '", "arguments": ' ~ (call.function.arguments | tojson) ~ '}' -}}
{{- '\\n</tool_call>' -}}
{%- endfor -%}
<|role_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<role>ASSISTANT</role>{%- endif -%}
"""


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy's bundle with its draft."""
    return build_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def server(toy: Path) -> Iterator[Running]:
    """A server of the toy; tests leave it idle."""
    with LLM(toy, max_batch=8, threads=1) as llm, served(llm) as running:
        yield running


@pytest.fixture(scope="session")
def tool_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The same with a chat template that knows tools."""
    with LLM(build_toy(tmp_path_factory.mktemp("tools"), TOOL_TEMPLATE), threads=1) as llm, served(llm) as running:
        yield running
