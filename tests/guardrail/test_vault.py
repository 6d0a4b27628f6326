"""What is hidden from the predictor is said again to the client, exactly; what never was hidden is not."""

import json
import time
from pathlib import Path
from random import Random

import httpx
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

import guardrail_values as made
from aim_guardrail.metrics import Metrics
from aim_guardrail.pipeline import Guard
from aim_guardrail.pipeline.context import RequestContext
from aim_guardrail.pipeline.screening import Screening
from aim_guardrail.pipeline.session import Session
from aim_guardrail.pipeline.vault import Vault, open_placeholder
from aim_guardrail.policy import PolicyError, parse_policy
from aim_guardrail.streams.events import StreamScreen
from aim_kserve.sse import EventReader
from fake_predictor import FakePredictor
from guarded import ask, events, guardrail, orders, said

POLICY = """
version: 2
name: vault
prompt:
  - {type: pii, action: redact, restore: true}
  - {type: secrets, action: redact}
answer:
  - {type: pii, action: redact}
  - {type: secrets, action: redact}
"""
MAIL, OTHER = "bob.o'neil@example.com", "eve@example.org"


@pytest.fixture(scope="module")
def guard() -> Guard:
    return Guard.load(parse_policy(POLICY, "vault.yaml"))


@pytest.fixture(scope="module")
def metrics() -> Metrics:
    return Metrics(CollectorRegistry())


@pytest.fixture
def screening(guard: Guard, metrics: Metrics) -> Screening:
    return Screening(guard, metrics, RequestContext("/v1/chat/completions"))


async def forwarded(screening: Screening, text: str) -> str:
    body = ask(text)
    await screening.screen("prompt", body)
    shown: str = body["messages"][0]["content"]
    return shown


async def answered(screening: Screening, text: str) -> str:
    body = {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]}
    await screening.screen("answer", body)
    shown: str = body["choices"][0]["message"]["content"]
    return shown


def streamed(screening: Screening, metrics: Metrics, pieces: list[str], field: str = "content") -> str:
    stream, reader, out = StreamScreen(screening, metrics), EventReader(), b""
    chunks = [{"choices": [{"index": 0, "delta": {field: piece}}]} for piece in pieces]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    for chunk in [*(orjson.dumps(chunk) for chunk in chunks), b"[DONE]"]:
        for event in reader.feed(b"data: %s\n\n" % chunk):
            out += stream.feed(event)
    return said(events(httpx.Response(200, content=out)), field=field)


async def test_an_echo_comes_back_as_it_was_sent(screening: Screening):
    text = f"Write to {MAIL} or +49 30 901820 and +4930901820."
    hidden = await forwarded(screening, text)
    assert hidden == "Write to <EMAIL_ADDRESS_1> or <PHONE_NUMBER_1> and <PHONE_NUMBER_2>."
    assert await answered(screening, hidden) == text
    assert await answered(screening, f"Not {OTHER}, <EMAIL_ADDRESS_1>!") == f"Not <EMAIL_ADDRESS_2>, {MAIL}!"


async def test_what_is_hidden_without_restore_stays_hidden(screening: Screening):
    token = made.github_pat(Random(1))
    hidden = await forwarded(screening, f"{token} and {MAIL}")
    assert hidden == "<SECRET_1> and <EMAIL_ADDRESS_1>"
    assert await answered(screening, hidden) == f"<SECRET_1> and {MAIL}"


async def test_what_only_the_answer_holds_is_not_kept(screening: Screening):
    assert await forwarded(screening, "hello") == "hello"
    assert await answered(screening, f"{OTHER} <EMAIL_ADDRESS_1>") == "<EMAIL_ADDRESS_1> <EMAIL_ADDRESS_1>"


async def test_placeholders_that_the_user_wrote_stand_for_themselves(screening: Screening):
    text = f"What is <EMAIL_ADDRESS_1>, {MAIL}, <EMAIL_ADDRESS_3> and {OTHER}?"
    hidden = await forwarded(screening, text)
    assert hidden == "What is <EMAIL_ADDRESS_1>, <EMAIL_ADDRESS_2>, <EMAIL_ADDRESS_3> and <EMAIL_ADDRESS_4>?"
    assert await answered(screening, hidden) == text
    # In a later part of the request: its number was given out already, so it is restored no more.
    await forwarded(screening, "and <EMAIL_ADDRESS_2>?")
    assert await answered(screening, hidden) == text.replace(MAIL, "<EMAIL_ADDRESS_2>")


async def test_a_placeholder_over_two_parts_of_one_text_stands_for_itself(screening: Screening):
    parts = [{"type": "text", "text": part} for part in ("<EMAIL_ADD", f"RESS_1> {MAIL}")]
    body = {"model": "m", "messages": [{"role": "user", "content": parts}]}
    from aim_guardrail.protocols.places import CHAT

    await screening.screen("prompt", body, CHAT)
    assert "".join(part["text"] for part in parts) == "<EMAIL_ADDRESS_1> <EMAIL_ADDRESS_2>"


async def test_values_are_written_as_json_within_arguments(guard: Guard, metrics: Metrics):
    own = POLICY.replace("restore: true", "restore: true, options: {custom: [{label: PATH, pattern: 'C:.[a-z]+'}]}")
    screening = Screening(Guard.load(parse_policy(own, "t"), guard), metrics, RequestContext("/"))
    assert await forwarded(screening, r"open C:\dir please") == "open <PATH_1> please"
    call = {"function": {"name": "open", "arguments": '{"path": "<PATH_1>"}'}}
    body = {"choices": [{"message": {"content": "<PATH_1>", "tool_calls": [call]}}]}
    await screening.screen("answer", body)
    assert body["choices"][0]["message"]["content"] == r"C:\dir"
    assert json.loads(call["function"]["arguments"]) == {"path": r"C:\dir"}


@pytest.mark.parametrize("field", ["content", "reasoning_content"])
async def test_a_placeholder_is_restored_however_the_stream_is_cut(screening: Screening, metrics: Metrics, field: str):
    hidden = await forwarded(screening, f"a {MAIL}, b < c <X_Y {OTHER}.")
    text = f"{hidden} <EMAIL_ADDRESS_9> <DIV <E <EMAIL_ADDRESS_"
    wanted = f"a {MAIL}, b < c <X_Y {OTHER}. <EMAIL_ADDRESS_9> <DIV <E <EMAIL_ADDRESS_"
    assert streamed(screening, metrics, [text], field) == wanted
    assert streamed(screening, metrics, list(text), field) == wanted
    for cut in range(len(text)):
        assert streamed(screening, metrics, [text[:cut], text[cut:]], field) == wanted, text[:cut]


@pytest.fixture(scope="module")
def prompts_only(guard: Guard) -> Guard:
    """Nothing new is found in answers, among whose placeholders other digits may stand for themselves."""
    return Guard.load(parse_policy(POLICY[: POLICY.index("answer:")], "prompts.yaml"), guard)


async def test_a_placeholder_is_no_context_for_what_follows(screening: Screening):
    assert await answered(screening, "<PHONE_NUMBER_1> 100 2024 <CREDIT_CARD_1> 4111 1111 1111") == (
        "<PHONE_NUMBER_1> 100 2024 <CREDIT_CARD_1> 4111 1111 1111"
    )


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 32))
async def test_restored_answers_equal_the_unredacted_ones(prompts_only: Guard, metrics: Metrics, seed: int):
    random = Random(seed)
    values = [made.PII[random.choice(sorted(made.PII))](random) for _ in range(random.randint(1, 8))]
    values += random.choices(values, k=2) + random.choices(["<EMAIL_ADDRESS_1>", "<PHONE_NUMBER_2>", "<b>"], k=2)
    random.shuffle(values)
    text = made.document(random, values)
    screening = Screening(prompts_only, metrics, RequestContext("/v1/chat/completions"))
    hidden = await forwarded(screening, text)
    assert hidden != text
    assert await answered(screening, hidden) == text
    assert streamed(screening, metrics, made.splits(random, hidden)) == text


@pytest.mark.parametrize("text", ["<", "a<", "<E", "<EMAIL_ADDRESS_12", "x <A <B", "<<"])
def test_what_may_become_a_placeholder_is_held(text: str):
    assert open_placeholder(text) == text.rindex("<")


@pytest.mark.parametrize("text", ["", "a", "<e", "<1", "< ", "<A>", "<" + "A" * 100])
def test_what_cannot_become_one_is_not(text: str):
    assert open_placeholder(text) == len(text)


def test_the_vault_tells_nothing_of_what_it_holds():
    vault = Vault()
    vault.keep("<A_1>", "s3cr3t")
    assert "s3cr3t" not in repr(vault) + str(vault)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("restore: true", "restore: 1"), "restore"),
        (("action: redact, restore", "action: flag, restore"), "hides nothing that could be restored"),
        (("name: vault", "name: vault\nstream: {mode: observe}"), "sends answers as they come"),
        (("name: vault", "name: vault\nstream: {mode: 'off'}"), "sends answers as they come"),
        (("answer:\n  - {type: pii,", "answer:\n  - {type: pii, restore: true,"), "remove it from the answer's rules"),
        (("version: 2", "version: 1"), "restore is new in version 2"),
    ],
)
def test_a_restore_that_cannot_be_is_refused(change: tuple[str, str], message: str):
    assert change[0] in POLICY
    with pytest.raises(PolicyError, match=message):
        parse_policy(POLICY.replace(*change), "t.yaml")


def test_over_http_the_predictor_sees_placeholders_and_the_client_values(predictor: FakePredictor, tmp_path: Path):
    policy = tmp_path / "vault.yaml"
    policy.write_text("version: 2\nname: vault\nprompt: [{type: pii, action: redact, restore: true}]\n")
    text = f"Mail {MAIL} and {OTHER}."
    with guardrail(predictor.host, "--policy", str(policy)) as server, httpx.Client(base_url=server.url) as client:
        whole = client.post("/v1/chat/completions", json=ask(text)).json()
        assert "<EMAIL_ADDRESS_1>" in str(predictor.last)
        assert MAIL not in str(predictor.last)
        assert text in whole["choices"][0]["message"]["content"]
        stream = client.post("/v1/chat/completions", json=ask(text, stream=True))
        assert text in said(events(stream))
        raw = 'data: {"choices":[{"index":0,"delta":{"content":"\\u003cEMAIL_"}}]}\n\n'
        raw += 'data: {"choices":[{"index":0,"delta":{"content":"ADDRESS_2>!"}}]}\n\ndata: [DONE]\n\n'
        split = client.post("/v1/chat/completions", json=ask(text, stream=True), headers=orders(raw=raw))
        assert said(events(split)) == f"{OTHER}!"
        v1 = client.post("/v1/models/m:predict", json={"instances": [text]}).json()
        assert text in json.dumps(v1)


def test_many_values_cost_no_more_than_their_number():
    def cpu_s(values: int) -> float:
        session, start = Session(), time.process_time()
        assert session.placeholder("X", "0") == "<X_1>"
        names = [session.placeholder("X", str(value)) for value in range(values)]
        assert names[-1] == f"<X_{values}>"
        return time.process_time() - start

    once = min(cpu_s(2_000) for _ in range(3))
    assert min(cpu_s(32_000) for _ in range(2)) < 4 * 16 * once
