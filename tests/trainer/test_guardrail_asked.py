"""Answers through a guardrail: the real one, in a process of its own, and what it costs when it is away."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from aim_trainer.errors import StoreError
from aim_trainer.evaluate import guardrail
from aim_trainer.evaluate.guardrail import Asked, rulings

KEY = "AK" + "IAQ3EGRBL7JX2VWP5M"


def test_each_answer_gets_its_ruling_in_order(filter_url: str) -> None:
    asked = [Asked("which key?", f"use {KEY}" if number % 3 == 0 else f"no {number}") for number in range(40)]
    found = rulings(filter_url + "/", "strict", asked)
    assert [each.action for each in found] == ["block" if number % 3 == 0 else "allow" for number in range(40)]
    assert found[0].families == ("secrets",)


def test_another_policy_than_the_one_named_is_no_judgement(filter_url: str) -> None:
    with pytest.raises(StoreError, match="judges by policy 'strict', not 'lax'"):
        rulings(filter_url, "lax", [Asked("a", "b")])


def test_what_the_guardrail_refuses_is_told(filter_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guardrail, "_AT_ONCE", 1000)
    with pytest.raises(StoreError, match="answered 400: items"):
        rulings(filter_url, None, [Asked("a", "b")] * 300)


def test_a_guardrail_that_is_away_is_told(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    monkeypatch.setattr(guardrail, "_PAUSES_S", (0.01, 0.01))
    with pytest.raises(StoreError, match=r"the guardrail is away: .*refused.*start `aim-guardrail"):
        rulings(f"http://127.0.0.1:{port}", None, [Asked("a", "b")])


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"<html>", "not an answer of aim_guardrail's"),
        (b"[]", "not an answer of aim_guardrail's"),
        (b'{"results": [7]}', "not an answer of aim_guardrail's"),
        (b'{"results": [{}]}', "not an answer of aim_guardrail's: results of another form"),
        (b'{"results": []}', "0 results for 1 texts"),
        (b'{"results": [{"error": {"message": "the judge is away"}}]}', "could not judge an answer: the judge is away"),
        (b'{"results": [{"error": 7}]}', "could not judge an answer: it gave no reason"),
    ],
)
def test_whoever_else_answers_there_judges_nothing(body: bytes, told: str) -> None:
    class Other(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Other) as other:
        thread = threading.Thread(target=other.serve_forever, args=(0.01,))
        thread.start()
        try:
            with pytest.raises(StoreError, match=told):
                rulings(f"http://127.0.0.1:{other.server_port}", None, [Asked("a", "b")])
        finally:
            other.shutdown()
            thread.join()


def test_an_address_that_is_none_is_told() -> None:
    with pytest.raises(StoreError, match="neither http:// nor https://"):
        rulings("file:///etc/passwd", None, [Asked("a", "b")])


def test_nothing_asked_is_nothing_sent() -> None:
    assert rulings("http://127.0.0.1:1", None, []) == []
