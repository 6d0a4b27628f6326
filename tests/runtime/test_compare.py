"""``aim-runtime compare`` over real metrics of our own families, and over what is none."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from aim_runtime.compare import CompareError, Reading, main, quantile, read, rows
from aim_runtime.engines.base import Usage
from aim_runtime.metrics import Metrics
from fake_engine import FakeEngine


def exposition(answers: dict[str, int], registry: CollectorRegistry | None = None, failed: int = 0) -> bytes:
    """The metrics of a server whose name ``chat`` has so many answers of each variant."""
    registry = registry or CollectorRegistry()
    for variant, count in answers.items():
        metrics = Metrics("chat", FakeEngine(served_model_name="chat"), registry, variant=variant)
        for number in range(count):
            metrics.first_token.observe(0.05 if variant == "a" else 0.5)
            metrics.finished("completions", 503 if number < failed else 200, 1.5, Usage(3, 10))
    return generate_latest(registry)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    file = tmp_path / "metrics"
    file.write_bytes(exposition({"a": 300, "b": 100}, failed=7))
    return file


def test_variants_stand_side_by_side(saved: Path):
    a, b = rows(read(str(saved)))
    assert (a.model, a.variant, a.requests, a.share, a.failed) == ("chat", "a", 300, 0.75, 7)
    assert (b.variant, b.requests, b.share) == ("b", 100, 0.25)
    assert a.tokens == pytest.approx(10 * 300 / 293)
    assert 40 <= (a.latencies["ttft_ms_p50"].value or 0) <= 60
    assert 250 <= (b.latencies["ttft_ms_p50"].value or 0) <= 500
    assert a.latencies["itl_ms_p95"].value is None


def test_what_came_after_an_earlier_reading(saved: Path, tmp_path: Path):
    later = tmp_path / "later"
    later.write_bytes(exposition({"a": 310, "b": 300}, failed=7))
    reading = read(str(later))
    reading.since(read(str(saved)))
    a, b = rows(reading)
    assert (a.requests, a.failed, b.requests) == (10, 0, 200)
    with pytest.raises(CompareError, match="started anew"):
        read(str(saved)).since(read(str(later)))


@pytest.mark.parametrize("values", [[0.3], [0.02, 0.3, 0.7, 3.0], [99.0]])
@pytest.mark.parametrize("share", [0.5, 0.95])
def test_quantiles_lie_in_the_right_bucket(values: list[float], share: float):
    registry = CollectorRegistry()
    bounds = (0.1, 0.5, 1.0, 5.0)
    name, labels = "aim_inter_token_latency_seconds", ["model_name", "variant"]
    histogram = Histogram(name, "t", labels, buckets=bounds, registry=registry)
    for value in values:
        histogram.labels("m", "v").observe(value)
    buckets = Reading(generate_latest(registry).decode()).buckets["m", "v"][name]
    found = quantile(buckets, share)
    exact = sorted(values)[max(0, -(-int(share * 100) * len(values) // 100) - 1)]
    assert found.value is not None
    assert found.at_least == (exact > bounds[-1])
    assert found.value <= next((bound for bound in bounds if bound >= exact), bounds[-1])
    assert found.value >= max((bound for bound in bounds if bound < exact), default=0.0)


def test_output_for_people_and_programs(saved: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(saved), "-o", "json"]) == 0
    assert [row["variant"] for row in json.loads(capsys.readouterr().out)] == ["a", "b"]
    assert main([str(saved), "--model", "chat"]) == 0
    shown = capsys.readouterr().out
    assert "75.0%" in shown
    assert "too few" not in shown


def test_few_requests_are_said_to_be_few(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "metrics"
    file.write_bytes(exposition({"a": 3, "b": 200}))
    assert main([str(file)]) == 0
    assert "a: fewer than 100 requests, too few to tell" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "flags", "said"),
    [
        ("", [], "no request to a name with variants"),
        ("aim_requests_total{", [], "holds no metrics"),
        ('aim_requests_total{variant="a"} 1', [], "holds no metrics"),
        (None, [], "No such file"),
        ("PLACEHOLDER", ["--model", "other"], "--model other: no such name with variants; there are: chat"),
    ],
)
def test_what_cannot_be_compared_is_said_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, flags: list[str], said: str
):
    file = tmp_path / "metrics"
    if text is not None:
        file.write_bytes(exposition({"a": 1}) if text == "PLACEHOLDER" else text.encode())
    assert main([str(file), *flags]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_server_that_is_not_there(capsys: pytest.CaptureFixture[str]):
    assert main(["http://127.0.0.1:9"]) == 1
    assert "Connection refused" in capsys.readouterr().err


def test_a_closed_server_is_asked_with_a_key(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    key = "aim_ops_0123"

    class Closed(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            admitted = self.headers["Authorization"] == f"Bearer {key}"
            self.send_response(200 if admitted else 401)
            self.end_headers()
            self.wfile.write(saved.read_bytes() if admitted else b"")

        def log_message(self, *_: object) -> None:
            pass

    file = tmp_path / "key"
    file.write_text(f"{key}\n")
    with ThreadingHTTPServer(("127.0.0.1", 0), Closed) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert main([url]) == 1
        assert (
            capsys.readouterr().err
            == f"error: {url}: answers 401, it wants a key of scope metrics: give --api-key-file\n"
        )
        assert main([url, "--api-key-file", str(file)]) == 0
        assert "chat" in capsys.readouterr().out
        server.shutdown()


@pytest.mark.parametrize("text", ["", "two words", "a\nb", "x" * 17_000, "k\u00e9y"])
def test_a_file_that_holds_no_key_is_refused_without_what_it_holds(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "key"
    file.write_text(text)
    assert main(["http://127.0.0.1:9", "--api-key-file", str(file)]) == 1
    refused = "does not hold one key: give a file of one word, visible ASCII, at most 16 KiB"
    assert capsys.readouterr().err == f"error: --api-key-file {file}: {refused}\n"


def test_it_is_a_verb_of_the_runtime(saved: Path) -> None:
    # In a process of its own: it takes signals as a filter does.
    command = [sys.executable, "-m", "aim_runtime", "compare", str(saved)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "chat" in done.stdout
