"""Templates from model files: Hugging Face's dialect, sandboxed."""

from __future__ import annotations

import pytest

from aim_runtime.engines.llama_cpp.chat_template import ChatTemplate, TemplateRefusal

HELLO = [{"role": "user", "content": "hi <b>"}]


def render(source: str, **variables: object) -> str:
    return ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}).render(HELLO, variables=variables)


def test_messages_special_tokens_and_generation_prompt():
    body = "{{bos_token}}{% for m in messages %}[{{m.role}}]{{m.content}}{% endfor %}"
    source = body + "{% if add_generation_prompt %}>{% endif %}"
    assert render(source) == "<s>[user]hi <b>>"


def test_blocks_leave_no_blank_lines():
    assert render("{% if true %}\n  {% if true %}\nx\n{% endif %}\n{% endif %}\n") == "x\n"


def test_loop_controls_generation_blocks_and_tojson():
    source = "{% for i in [1, 2] %}{% break %}{% endfor %}{% generation %}a{% endgeneration %}{{ messages | tojson }}"
    assert render(source) == 'a[{"role": "user", "content": "hi <b>"}]'


def test_variables_reach_the_template_but_never_replace_messages():
    assert render("{{ thinking }}{{ messages | length }}", thinking="on", messages=[]) == "on1"


def test_strftime_now_is_a_date():
    assert render("{{ strftime_now('%Y') }}").isdigit()


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.nothing.here }}", "nothing"),
        ("{{ messages[0].content + 1 }}", "concatenate"),
        ("{{ ().__class__.__bases__[0].__subclasses__() }}", "unsafe"),
    ],
)
def test_a_template_that_refuses_or_fails_says_why(source: str, reason: str):
    with pytest.raises(TemplateRefusal, match=reason):
        render(source)


def test_a_template_that_is_no_jinja_is_refused():
    with pytest.raises(TemplateRefusal, match="not valid Jinja"):
        ChatTemplate("{% if %}", {})


def test_tools_are_known_by_their_mention():
    assert ChatTemplate("{% if tools %}{% endif %}", {}).takes_tools
    assert not ChatTemplate("{{ messages }}", {}).takes_tools


CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize(
    ("content", "source", "ends"),
    [
        ("The answer is ", CHATML, "The answer is "),
        ("The answer is ", CHATML.replace("m.content", "m.content | trim"), "The answer is"),
        ("a<|end|>b", CHATML, "a<|end|>b"),
        ("", CHATML, ""),
        ("hi", CHATML.replace("m.content", "m.content | tojson"), '"hi'),
    ],
    ids=["as it is", "trimmed", "with the end marker in it", "empty", "inside quotes"],
)
def test_a_final_message_is_left_open(content: str, source: str, ends: str):
    messages = [*HELLO, {"role": "assistant", "content": content}]
    prompt = ChatTemplate(source, {}).render(messages, continue_final_message=True)
    assert prompt.endswith(f"<|assistant|>{ends}")
    assert prompt.count("<|assistant|>") == 1


def test_a_final_message_that_the_template_drops_cannot_be_continued():
    template = ChatTemplate("{{ messages[0].content }}", {})
    with pytest.raises(TemplateRefusal, match="leaves out the final message"):
        template.render([*HELLO, {"role": "assistant", "content": "x"}], continue_final_message=True)
