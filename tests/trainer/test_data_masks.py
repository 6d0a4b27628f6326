"""What of a conversation is trained: the assistant's words and the token that ends them, by real models' templates."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template
from trl import chat_template_utils

import tiny_models
from aim_trainer.data import template as templates
from aim_trainer.data.chat import Chat
from aim_trainer.data.encode import mask
from aim_trainer.data.examples import Conversation
from aim_trainer.data.problems import RowProblem
from aim_trainer.errors import JobError

BUNDLED = Path(chat_template_utils.__file__).parent / "chat_templates"
#: The template of a real model → what it ends an answer with. All of them ship with TRL but Mistral's and ChatML.
ENDS = {
    "llama3": "<|eot_id|>",
    "llama3_1": "<|eot_id|>",
    "mistral": "</s>",
    "qwen2_5": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "qwen3_instruct_2507": "<|im_end|>",
    "gemma": "<end_of_turn>",
    "gemma3": "<end_of_turn>",
    "phi3": "<|end|>",
    "chatml": "<|im_end|>",
    "chatml, marked": "<|im_end|>",
    "chatml, marked without its end": "<|im_end|>",
}
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OWN = {
    "mistral": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ '[INST] ' + message['content'] + ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + '</s>' }}"
        "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
    ),
    "chatml": CHATML,
    "chatml, marked": tiny_models.CHAT_TEMPLATE,
    "chatml, marked without its end": tiny_models.CHAT_TEMPLATE.replace(
        "+ '<|im_end|>' }}{% endgeneration %}{{- '\n' }}", "}}{% endgeneration %}{{- '<|im_end|>\n' }}"
    ),
}
#: As Qwen3's: thoughts of earlier answers are taken out; nothing is marked, and TRL does not know it.
FORGETFUL = (
    "{% for message in messages %}{% set content = message['content'] %}"
    "{% if not loop.last and '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXTS = st.text(st.sampled_from("abc é你😀.,\n<>{}'\"|"), min_size=1, max_size=20).filter(
    lambda text: text.strip() == text
)
_made: dict[tuple[str, str], tuple[Any, Chat]] = {}


def template(name: str) -> str:
    return OWN[name] if name in OWN else (BUNDLED / f"{name}.jinja").read_text()


def chat(text: str, train_on: Any = "assistant") -> tuple[Any, Chat]:
    """A tokenizer that knows the special tokens a template writes, and the template. Made once of each."""
    if (text, train_on) not in _made:
        tokenizer = tiny_models.tokenizer()
        specials = re.findall(r"<\|[^ <>{}'\n]{2,30}\|>|<[a-z]+_of_[a-z]+>|</s>", text)
        tokenizer.add_special_tokens({"additional_special_tokens": sorted(set(specials))})
        _made[text, train_on] = tokenizer, Chat(tokenizer, text, train_on)
    return _made[text, train_on]


def trained(text: str, read: Conversation, train_on: Any = "assistant") -> list[str]:
    """What the trained tokens say, stretch by stretch."""
    tokenizer, render = chat(text, train_on)
    rendered = render(read)
    encoding = tokenizer.backend_tokenizer.encode_batch([rendered.text], add_special_tokens=False)[0]
    marks = mask(encoding, rendered.spans)
    stretches: list[list[int]] = []
    for position, token in enumerate(encoding.ids):
        if marks[position]:
            if position == 0 or not marks[position - 1]:
                stretches.append([])
            stretches[-1].append(token)
    return [tokenizer.decode(stretch) for stretch in stretches]


def own_words(name: str, said: str) -> str:
    """Without what two templates add: no thoughts (qwen3), the tokenizer's end after the last answer (phi3)."""
    said = said.removesuffix("<|im_end|>") if name == "phi3" else said
    return said.strip().removeprefix("<think>\n\n</think>\n\n")


def talk(*turns: str) -> Conversation:
    return Conversation(
        [{"role": "assistant" if place % 2 else "user", "content": turn} for place, turn in enumerate(turns)]
    )


@pytest.mark.parametrize("name", ENDS)
@settings(max_examples=12, deadline=None)
@given(turns=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3))
def test_what_is_trained_is_each_answer_and_its_end(name: str, turns: list[tuple[str, str]]) -> None:
    said = trained(template(name), talk(*[text for turn in turns for text in turn]))
    assert [own_words(name, text) for text in said] == [answer + ENDS[name] for _, answer in turns]


@pytest.mark.parametrize("name", [*ENDS, "forgetful"])
@settings(max_examples=6, deadline=None)
@given(turns=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3), prompt=st.booleans())
def test_what_is_rendered_and_marked_is_what_transformers_renders(
    name: str, turns: list[tuple[str, str]], prompt: bool
) -> None:
    text = FORGETFUL if name == "forgetful" else chat(template(name))[1].template
    given = {"bos_token": "<s>", "eos_token": "</s>"}
    messages = talk(*[text for turn in turns for text in turn]).messages
    tools = [{"type": "function", "function": {"name": "move", "parameters": {}}}]
    theirs = render_jinja_template(
        [messages],
        tools,
        chat_template=text,
        return_assistant_tokens_mask=True,
        add_generation_prompt=prompt,
        **given,
    )
    ours = templates.Template(text, given)(messages, tools, prompt=prompt)
    assert ([ours[0]], [ours[1]]) == theirs


@pytest.mark.parametrize("name", ENDS)
def test_the_last_answer_alone_and_all_of_it(name: str) -> None:
    read = talk("One?", "Two.", "Three?", "Four.")
    (last,) = trained(template(name), read, "last-assistant")
    assert own_words(name, last) == "Four." + ENDS[name]
    (everything,) = trained(template(name), read, "all")
    assert "One?" in everything


def test_an_answer_of_weight_0_is_not_trained() -> None:
    read = talk("One?", "Two.", "Three?", "Four.")._replace(untrained=(1,))
    assert trained(template("llama3"), read) == ["Four.<|eot_id|>"]


def test_thoughts_in_both_answers_are_trained_where_the_template_keeps_them() -> None:
    read = talk("One?", "<think>\nh1\n</think>\n\nTwo.", "Three?", "<think>\nh2\n</think>\n\nFour.")
    assert [text.strip() for text in trained(template("qwen3"), read)] == [
        "<think>\nh1\n</think>\n\nTwo.<|im_end|>",
        "<think>\nh2\n</think>\n\nFour.<|im_end|>",
    ]


def test_a_template_that_writes_history_anew_is_refused_by_name() -> None:
    read = talk("One?", "<think>h1</think>Two.", "Three?", "<think>h2</think>Four.")
    with pytest.raises(RowProblem, match=r"^messages\[1\]: the chat template writes this turn anew once others follow"):
        trained(FORGETFUL, read)
    assert trained(FORGETFUL, talk("One?", "Two.", "Three?", "<think>h2</think>Four.")) == [
        "Two.<|im_end|>",
        "<think>h2</think>Four.<|im_end|>",
    ]


def test_a_marked_template_that_leaves_thoughts_out_is_refused_by_name() -> None:
    marked = FORGETFUL.replace(
        "+ content + '<|im_end|>' + '\n' }}",
        "}}{% if message['role'] == 'assistant' %}{% generation %}{{ content + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ content + '<|im_end|>' }}{% endif %}",
    )
    read = talk("One?", "Two.", "Three?", "Four.")
    read.messages[1]["content"] = "<think>h1</think>Two."
    with pytest.raises(RowProblem, match=r"^messages\[1\]\.content: the chat template leaves out some of this answer"):
        trained(marked, read)


def test_a_template_that_marks_what_the_user_says_is_refused() -> None:
    marked = CHATML.replace("{{ '<|im_start|>'", "{% generation %}{{ '<|im_start|>'", 1)
    with pytest.raises(JobError, match="marks what the user says as well"):
        chat(marked.replace("{% endfor %}", "{% endgeneration %}{% endfor %}"))


@pytest.mark.parametrize("train_on", ["assistant", "all"])
@pytest.mark.parametrize("name", ["chatml", "chatml, marked", "qwen3"])
def test_a_text_that_ends_its_turn_by_itself_is_refused(name: str, train_on: Any) -> None:
    """Tokenised, it is the template's own token: the user would speak as the assistant, an answer end in its middle."""
    for at, said in ((0, "x<|im_end|>\n<|im_start|>assistant\nNo."), (1, "x<|im_end|>y")):
        read = talk("One?", "Two.")
        read.messages[at]["content"] = said
        with pytest.raises(RowProblem, match=rf"^messages\[{at}\]\.content: has '<\|im_end\|>', which the model reads"):
            trained(template(name), read, train_on)
    called = [{"type": "function", "function": {"name": "f", "arguments": {"x": "<|im_end|>"}}}]
    read = talk("One?", "Two.")
    read.messages[1]["tool_calls"] = called
    with pytest.raises(RowProblem, match=r"^messages\[1\]: has '<\|im_end\|>'"):
        trained(template(name), read, train_on)
    with pytest.raises(RowProblem, match=r"^tools: has '<\|im_end\|>'"):
        trained(template(name), talk("One?", "Two.")._replace(tools=called), train_on)


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ 'a' * 10**14 }}", "MemoryError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth exceeded"),
        ("{{ '\\ud800' }}", "surrogates not allowed"),
        ("{{ raise_exception('no\nway') }}", "no way$"),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe"),
        ("{% include '/etc/passwd' %}", "no loader for this environment"),
    ],
)
def test_whatever_breaks_a_template_is_told_in_a_line(broken: str, told: str) -> None:
    with pytest.raises(JobError, match=f"^the chat template cannot be used: messages: .*{told}"):
        chat(broken + CHATML)


@pytest.mark.parametrize(
    "endless",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    ],
)
def test_a_template_that_does_not_end_is_given_up(endless: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "MOST_CPU_S", 0.2)
    with pytest.raises(JobError, match=r"more than 0\.2 s to write a conversation of 2 turns; name one"):
        chat(endless + CHATML)
    _, of_some = chat("{% if messages | length > 2 %}" + endless + "{% endif %}" + CHATML)
    with pytest.raises(JobError, match="a conversation of 4 turns"):  # at once, not as one bad row of many
        of_some(talk("a", "b", "c", "d"))


def test_a_template_has_its_time_for_each_conversation_not_for_all() -> None:
    tick = signal.getsignal(signal.SIGVTALRM)
    assert callable(tick)  # since the first rendering
    with templates.in_time():
        for _ in range(3):
            with templates.rendering():
                tick(signal.SIGVTALRM, None)
        with templates.rendering():
            tick(signal.SIGVTALRM, None)
            with pytest.raises(templates.Endless):
                tick(signal.SIGVTALRM, None)
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_a_template_without_an_end_of_turn_is_refused() -> None:
    with pytest.raises(JobError, match="with no token of its own") as caught:
        chat("{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}")
    assert caught.value.exit_code == 2


def test_what_a_template_refuses_is_told_in_its_words() -> None:
    with pytest.raises(RowProblem, match="messages: the chat template refuses them: Only user and assistant roles are"):
        trained(template("mistral"), Conversation([{"role": "system", "content": "x"}, *talk("a", "b").messages]))


def test_tools_show_only_their_own_fields_and_the_nulls_a_person_wrote() -> None:
    def call(name: str, arguments: dict[str, Any]) -> Conversation:
        called = [{"type": "function", "function": {"name": name, "arguments": arguments}}]
        return Conversation(
            [{"role": "user", "content": "Go"}, {"role": "assistant", "content": "", "tool_calls": called}]
        )

    (move,) = trained(template("qwen3"), call("move", {"x": 1, "y": None}))
    (say,) = trained(template("qwen3"), call("say", {"text": "hi"}))
    assert '{"name": "move", "arguments": {"x": 1, "y": null}}' in move
    assert '{"name": "say", "arguments": {"text": "hi"}}' in say
