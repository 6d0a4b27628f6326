"""A served name whose requests are shared out among variants: by weight, the same caller to the same one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from aim_kserve.kserve import pb, pb_grpc
from aim_runtime.models.directory import Models
from aim_runtime.models.entry import Launch, ModelEntry, VariantEntry
from aim_runtime.models.variants import choose
from fake_engine import FakeEngine
from served import Served

CHAT = "/v1/chat/completions"
ASK = [{"role": "user", "content": "hi"}]
VARIANT = "x-model-variant"


def test_shares_follow_the_weights() -> None:
    found = Counter(choose({"a": 80, "b": 15, "c": 5}, f"user {index}") for index in range(20_000))
    assert found["a"] / 20_000 == pytest.approx(0.80, abs=0.02)
    assert found["b"] / 20_000 == pytest.approx(0.15, abs=0.02)
    assert found["c"] / 20_000 == pytest.approx(0.05, abs=0.01)


WEIGHTS = st.dictionaries(st.text(min_size=1), st.floats(0.01, 1000), min_size=2, max_size=6)


@given(WEIGHTS, st.text())
def test_only_callers_of_a_variant_that_leaves_move(weights: dict[str, float], key: str) -> None:
    chosen = choose(weights, key)
    for gone in weights:
        rest = {name: weight for name, weight in weights.items() if name != gone}
        assert gone == chosen or choose(rest, key) == chosen


@given(WEIGHTS, st.text(), st.floats(1, 10))
def test_only_callers_that_a_growing_variant_wins_move(weights: dict[str, float], key: str, factor: float) -> None:
    grown = next(iter(weights))
    moved = choose({**weights, grown: weights[grown] * factor}, key)
    assert moved in (grown, choose(weights, key))


@pytest.mark.parametrize(
    ("variants", "says"),
    [
        ({"chat": {"a": 1, "nobody": 1}}, "chat: no model is named 'nobody'; there are: a"),
        ({"chat": {"a": 0}}, "chat: the weight of a must be a number > 0 (got 0)"),
        ({"chat": {"a": float("inf")}}, "must be a number > 0"),
        ({"chat": {}}, "chat: give at least one variant"),
        ({"a": {"a": 1}}, "'a' names both a and a"),
    ],
)
def test_what_is_no_split(variants: dict[str, dict[str, float]], says: str) -> None:
    entry = ModelEntry("a", (Launch(lambda: FakeEngine("a")),))
    splits = [VariantEntry(name, weights) for name, weights in variants.items()]
    with pytest.raises(ValueError, match=re.escape(says)):
        Models([entry], splits, registry=CollectorRegistry())


@pytest.fixture(scope="module")
def split() -> Iterator[Served]:
    """``chat``: 70 parts of ``base``, 30 of ``tuned``."""
    models = {"base": {}, "tuned": {"engine": {"max_model_len": 500}}}
    with Served.fake_models(models=models, variants={"chat": {"base": 70, "tuned": 30}}) as server:
        yield server


def ask(server: Served, *, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    body = {"model": "chat", "messages": ASK, "max_tokens": 1, **fields}
    answer = httpx.post(server.url + CHAT, json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer


def test_a_user_stays_with_a_variant_on_every_protocol(split: Served) -> None:
    seen = set()
    for index in range(12):
        user = f"user {index}"
        variant = ask(split, user=user).headers[VARIANT]
        seen.add(variant)
        assert ask(split, user=user).json()["model"] == variant
        assert ask(split, headers={"x-user-id": user}).headers[VARIANT] == variant
        assert ask(split, user=user, stream=True).headers[VARIANT] == variant
        instances = {"instances": ["x", "y"], "parameters": {"user": user, "max_tokens": 1}}
        assert httpx.post(f"{split.url}/v1/models/chat:predict", json=instances).headers[VARIANT] == variant
        tensor = {"name": "prompt", "shape": [1], "datatype": "BYTES", "data": ["x"]}
        v2 = httpx.post(f"{split.url}/v2/models/chat/infer", json={"inputs": [tensor]}, headers={"x-user-id": user})
        assert (v2.status_code, v2.headers[VARIANT], v2.json()["model_name"]) == (200, variant, "chat")
    assert seen == {"base", "tuned"}


def test_who_names_no_user_is_shared_out(split: Served) -> None:
    client = openai.OpenAI(base_url=f"{split.url}/v1", api_key="none", max_retries=0)
    answers = [client.chat.completions.create(model="chat", messages=ASK, max_tokens=1) for _ in range(60)]
    assert 20 < Counter(answer.model for answer in answers)["base"] < 58


def test_a_variant_by_its_own_name_carries_no_header(split: Served) -> None:
    assert VARIANT not in ask(split, model="tuned").headers


def test_cards_tell_the_variants(split: Served) -> None:
    client = openai.OpenAI(base_url=f"{split.url}/v1", api_key="none", max_retries=0)
    assert [card.id for card in client.models.list()] == ["base", "tuned", "chat"]
    card = client.models.retrieve("chat").model_dump()
    assert card["variants"] == [
        {"name": "base", "weight": 70, "ready": True},
        {"name": "tuned", "weight": 30, "ready": True},
    ]
    assert card["max_model_len"] == 500


def test_grpc(split: Served) -> None:
    with grpc.insecure_channel(split.grpc_url) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        assert stub.ModelReady(pb.ModelReadyRequest(name="chat")).ready
        request = pb.ModelInferRequest(model_name="chat")
        request.inputs.add(name="prompt", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"x")
        assert stub.ModelInfer(request).model_name == "chat"


def test_metrics_and_the_access_log_tell_the_variant(split: Served) -> None:
    ask(split, user="one")
    lines = [line for line in httpx.get(f"{split.url}/metrics").text.splitlines() if "aim_requests_total{" in line]
    assert any('model_name="chat"' in line and 'variant="' in line and 'variant=""' not in line for line in lines)
    logged = [line for line in split.access_lines() if line["path"] == CHAT]
    assert logged[-1]["variant"] in ("base", "tuned")


def test_a_variant_that_leaves_is_nobodys_any_more(split: Served) -> None:
    users = [f"user {index}" for index in range(12)]
    before = {user: ask(split, user=user).headers[VARIANT] for user in users}
    refusal = httpx.post(f"{split.url}/v2/repository/models/chat/unload")
    assert (refusal.status_code, "unload one of those: base, tuned" in refusal.json()["error"]) == (400, True)
    assert httpx.post(f"{split.url}/v2/repository/models/tuned/unload").status_code == 200
    assert {ask(split, user=user).headers[VARIANT] for user in users} == {"base"}
    assert 'variant="tuned"' not in httpx.get(f"{split.url}/metrics").text
    assert httpx.post(f"{split.url}/v2/repository/models/base/unload").status_code == 200
    answer = httpx.post(split.url + CHAT, json={"model": "chat", "messages": ASK})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_variant_ready")
    assert httpx.get(f"{split.url}/v1/models/chat").status_code == 503
    assert httpx.get(f"{split.url}/v2/models/chat/ready").status_code == 503
    for name in ("base", "tuned"):
        assert httpx.post(f"{split.url}/v2/repository/models/{name}/load").status_code == 200
    assert {user: ask(split, user=user).headers[VARIANT] for user in users} == before
