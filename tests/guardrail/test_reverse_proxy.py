"""Before any OpenAI server: over TLS, by its own name, with the transformer's key in the client's place."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

import certificates
from fake_predictor import FakePredictor
from guarded import guardrail, orders
from served import Served


@pytest.fixture(scope="module")
def provider(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FakePredictor, Path]]:
    file = certificates.certificate(tmp_path_factory.mktemp("tls") / "provider.pem")
    with FakePredictor(tls=certificates.of_server(file)) as predictor:
        yield predictor, file


@pytest.fixture(scope="module")
def before(provider: tuple[FakePredictor, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    predictor, certificate = provider
    key = tmp_path_factory.mktemp("key") / "key"
    key.write_text("sk-of-the-company")
    flags = ("--predictor_use_ssl", "--predictor_api_key_file", str(key))
    trusts = {**os.environ, "SSL_CERT_FILE": str(certificate)}
    with guardrail(f"localhost:{predictor.port}", *flags, env=trusts) as server:
        yield server


def test_a_stock_client_is_guarded_before_a_provider(before: Served, provider: tuple[FakePredictor, Path]):
    with openai.OpenAI(base_url=f"{before.url}/v1", api_key="a-clients-own", max_retries=0) as client:
        said = [{"role": "user", "content": "I am bob@example.com"}]
        answer = client.chat.completions.create(model="m", messages=said)  # type: ignore[arg-type]
        assert answer.choices[0].message.content
        streamed = client.chat.completions.create(
            model="m",
            messages=said,
            stream=True,
            extra_headers=orders(say="call 4111 1111 1111 1111 now"),  # type: ignore[arg-type]
        )
        shown = "".join(chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices)
    predictor, _ = provider
    headers = dict(predictor.last["headers"])
    assert (headers["Host"], headers["authorization"]) == (f"localhost:{predictor.port}", "Bearer sk-of-the-company")
    assert b"bob@example.com" not in predictor.last["body"]
    assert "a-clients-own" not in str(predictor.last)
    assert "4111" not in shown


def test_a_provider_nobody_vouches_for_is_not_spoken_to(provider: tuple[FakePredictor, Path]):
    predictor, _ = provider
    seen = len(predictor.seen)
    with guardrail(f"localhost:{predictor.port}", "--predictor_use_ssl") as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0)
        with pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hi"}])
    assert (caught.value.status_code, caught.value.code) == (503, "predictor_unreachable")
    assert len(predictor.seen) == seen
