"""LoRA adapters are models of their own to a client: listed, retrieved, asked for by name."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from served import Served


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    with (
        Served.fake(adapters=["lora-a", "lora-b"]) as served,
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def test_adapters_are_listed_with_their_parent(client: openai.OpenAI) -> None:
    cards = [card.model_dump() for card in client.models.list()]
    assert [(card["id"], card.get("parent")) for card in cards] == [("m", None), ("lora-a", "m"), ("lora-b", "m")]
    assert client.models.retrieve("lora-b").id == "lora-b"


def test_an_adapter_is_asked_by_name(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="lora-a", messages=[{"role": "user", "content": "Hi"}], max_tokens=2, extra_body={}
    )
    assert answer.choices[0].message.content


def test_an_unknown_name_is_told_all_known_ones(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="m, lora-a, lora-b"):
        client.completions.create(model="lora-c", prompt="x")
