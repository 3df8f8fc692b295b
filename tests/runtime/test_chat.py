"""Chat templates render as Transformers renders them, in a sandbox, and fail with a sentence."""

import json
import re

import pytest

from angelforge.errors import AngelForgeError, UsageError
from angelforge.exporter.synthetic_tokenizer import CHAT_TEMPLATE
from angelforge.runtime.chat import ChatTemplate

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "世界?"},
]


def render(source, messages=None, tokens=None, **options):
    return ChatTemplate(source, tokens or {}).render(TALK if messages is None else messages, **options)


def test_a_conversation_in_the_models_own_format():
    prompt = (
        "<role>SYSTEM</role>Be brief.<|role_end|><role>HUMAN</role>Hi<|role_end|>"
        "<role>ASSISTANT</role>Hello<|role_end|><role>HUMAN</role>世界?<|role_end|>"
    )
    assert render(CHAT_TEMPLATE) == prompt + "<role>ASSISTANT</role>"
    assert render(CHAT_TEMPLATE, add_generation_prompt=False) == prompt


def test_blocks_are_trimmed_and_loop_controls_and_training_marks_known():
    source = """{% for message in messages %}
    {% if message.role == 'system' %}
        {% continue %}
    {% endif %}
    {% if loop.index > 3 %}
        {% break %}
    {% endif %}
{% generation %}
{{ message.content }}
{% endgeneration %}
{% endfor %}"""
    assert render(source) == "Hi\nHello\n"


def test_special_tokens_tools_and_json_as_transformers_gives_them():
    source = "{{ bos_token }}{{ tools is none }}{{ messages[3] | tojson }}{{ {'a': 1} | tojson(indent=2) }}"
    assert render(source, tokens={"bos_token": "<s>"}) == ('<s>True{"role": "user", "content": "世界?"}{\n  "a": 1\n}')


def test_the_date_can_be_asked_for():
    assert re.fullmatch(r"\d{4}-\d\d", render("{{ strftime_now('%Y-%m') }}"))


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{{ messages[0]['role'] + 1 }}",
        "{{ messages[9]['role'] }}",
        "{{ missing.attribute }}",
        "{{ 1 // 0 }}",
        "{{ messages | tojson(indent=missing) }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{% include 'other' %}",
    ],
)
def test_templates_that_reach_further_or_break_are_stopped(source):
    with pytest.raises(AngelForgeError, match="refuses these messages"):
        render(source)


def test_what_a_template_says_reaches_the_user():
    with pytest.raises(AngelForgeError, match=r"refuses these messages: Unknown role tool; .* assistant\.$"):
        render(CHAT_TEMPLATE, [{"role": "tool", "content": "x"}])


def test_a_template_that_is_no_jinja_is_refused_with_its_line():
    with pytest.raises(AngelForgeError, match=r"not a valid Jinja template: .* \(line 2\)"):
        ChatTemplate("fine\n{% for %}", {})


@pytest.mark.parametrize(
    "messages", [[], ["text"], [{"content": "x"}], [{"role": "user"}], [{"role": 1, "content": ""}]]
)
def test_malformed_messages_are_wrong_use(messages):
    with pytest.raises(UsageError, match="chat"):
        render(CHAT_TEMPLATE, messages)


def test_messages_are_not_shown_in_errors():
    with pytest.raises(UsageError) as caught:
        render(CHAT_TEMPLATE, [{"role": "user", "text": "secret"}])
    assert "secret" not in str(caught.value)


def settings(folder, **content):
    (folder / "tokenizer_config.json").write_text(json.dumps(content))


def test_the_template_is_found_in_the_places_of_a_checkpoint_in_their_order(tmp_path):
    def found():
        template = ChatTemplate.load(tmp_path)
        return template and template.render(TALK)

    assert found() is None
    settings(tmp_path, eos_token={"content": "<e>"}, bos_token=None, chat_template=None)
    assert found() is None
    settings(tmp_path, chat_template=[{"name": "tools", "template": "t"}, {"name": "default", "template": "list"}])
    assert found() == "list"
    settings(tmp_path, eos_token={"content": "<e>"}, chat_template="settings {{ eos_token }}{{ bos_token }}")
    assert found() == "settings <e>"
    (tmp_path / "chat_template.json").write_text('{"chat_template": "json {{ eos_token }}"}')
    assert found() == "json <e>"
    (tmp_path / "chat_template.jinja").write_text("jinja {{ eos_token }}")
    assert found() == "jinja <e>"


@pytest.mark.parametrize("value", [3, [], [{"name": "other", "template": "x"}], [{"name": "default", "template": 1}]])
def test_a_template_of_the_wrong_kind_is_named(tmp_path, value):
    settings(tmp_path, chat_template=value)
    with pytest.raises(AngelForgeError, match=r"tokenizer_config\.json: chat_template is neither"):
        ChatTemplate.load(tmp_path)


def test_a_template_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(AngelForgeError, match=r"chat_template\.jinja cannot be read"):
        ChatTemplate.load(tmp_path)
