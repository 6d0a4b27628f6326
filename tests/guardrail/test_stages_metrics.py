"""What Prometheus reads of the guardrail: fed by real requests, checked by promtool, named on the page."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from fake_predictor import FakePredictor
from guarded import ask
from scripted_guardrail import CHAT, Guarded, serving

POLICY = """
use_case: codegen
budget_ms: 1000
speculative: true
prompt:
  - {type: pii, action: redact}
  - parallel:
      - {type: scripted, id: near, options: {name: near, cacheable: true}, action: {BAD: block, WORSE: redact}}
      - {type: scripted, id: far, options: {name: far, cost: remote}, action: flag, on_error: open, on_timeout: open}
answer:
  - {type: pii, action: redact}
  - {type: scripted, id: late, options: {name: late}, action: flag}
"""
DETECTOR_BUCKETS = [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.2, 0.5, 1, 5, 30]


@pytest.fixture(scope="module")
def fed(predictor: FakePredictor, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The whole exposition, once each family has something to say."""
    folder = tmp_path_factory.mktemp("metrics")
    with serving(POLICY, folder, predictor.host, "--audit_file", str(folder / "audit.jsonl")) as guarded:
        _feed(guarded)
        yield httpx.get(f"{guarded.server.url}/metrics").text


def _feed(guarded: Guarded) -> None:
    guarded("write bob@example.com")
    guarded("write bob@example.com")
    guarded("near=bad")
    guarded("near=worse")
    guarded("far=bad")
    guarded("near=sleep:30")
    guarded("far=sleep:30 ")
    for _ in range(6):
        guarded("far=fail")
    httpx.post(f"{guarded.server.url}{CHAT}", json=ask("hi", stream=True), timeout=30)


Samples = dict[str, list[tuple[dict[str, str], float]]]


@pytest.fixture
def samples(fed: str) -> Samples:
    found: Samples = {}
    for family in text_string_to_metric_families(fed):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def test_what_is_counted(samples: Samples) -> None:
    def of(name: str, **labels: str) -> float:
        return sum(value for found, value in samples[f"guardrail_{name}"] if labels.items() <= found.items())

    codegen = {"direction": "prompt", "use_case": "codegen"}
    assert of("requests_total", **codegen, decision="block") == 1
    assert of("requests_total", **codegen, decision="timeout") == 1
    assert of("requests_total", **codegen, decision="redact") == 3
    assert of("overhead_seconds_count", **codegen) == of("requests_total", **codegen) == 14
    assert of("detections_total", family="scripted", label="BAD", action="block") == 1
    assert of("detector_duration_seconds_count", detector="near", family="scripted", result="blocked") == 1
    assert of("detector_duration_seconds_count", detector="near", result="timeout") == 1
    assert of("detector_duration_seconds_count", detector="far", result="flagged") == 1
    assert of("detector_duration_seconds_count", detector="far", result="timeout") >= 1
    assert of("errors_total", detector="far", reason="degraded") >= 6
    assert of("timeouts_total", detector="near", outcome="closed") == 1
    assert of("timeouts_total", detector="far", outcome="open") >= 1
    assert of("skipped_total", detector="near", reason="cache") >= 1
    assert of("skipped_total", detector="far", reason="breaker") >= 1
    assert of("budget_exceeded_total", use_case="codegen") == 2
    assert of("cache_total", tier="l1", result="hit") >= 1
    assert of("speculative_total", outcome="kept") >= 1
    assert of("speculative_total", outcome="dropped") == 2
    assert of("speculative_total", outcome="repeated") == 1
    assert of("abandoned_calls") == 0
    assert of("stream_hold_seconds_count") == 1


def test_a_detectors_histogram_has_the_buckets_that_budgets_are_read_from(samples: Samples) -> None:
    found = {labels["le"] for labels, _ in samples["guardrail_detector_duration_seconds_bucket"]}
    assert sorted(map(float, found)) == [*DETECTOR_BUCKETS, float("inf")]


@pytest.mark.system
def test_promtool_finds_nothing_to_say(fed: str) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is missing: make system-deps")
    ours = [line for line in fed.splitlines() if re.match(r"(# (HELP|TYPE) )?guardrail_", line)]
    check = subprocess.run(
        [promtool, "check", "metrics"], input="\n".join(ours) + "\n", text=True, capture_output=True, check=False
    )
    assert (check.returncode, check.stdout, check.stderr) == (0, "", "")


def test_the_page_names_every_family_and_no_other(fed: str) -> None:
    page = (Path(__file__).parents[2] / "docs/metrics.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `(guardrail_\w+)`", page, re.MULTILINE))
    known = {found[1] for found in re.finditer(r"^# TYPE (guardrail_\w+) ", fed, re.MULTILINE)}
    assert named == known
