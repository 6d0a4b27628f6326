"""How busy a server says it is, read from its Prometheus metrics. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

#: vLLM (docs.vllm.ai, "Production Metrics"; the older ``gpu_`` name too), SGLang (docs.sglang.io, "Production
#: Metrics"), llama-server (tools/server/README.md, ``--metrics``), and this runtime itself.
RUNNING = frozenset(
    ("vllm:num_requests_running", "sglang:num_running_reqs", "llamacpp:requests_processing", "aim_requests_running")
)
WAITING = frozenset(
    ("vllm:num_requests_waiting", "sglang:num_queue_reqs", "llamacpp:requests_deferred", "aim_requests_waiting")
)
KV_USAGE = frozenset(
    (
        "vllm:kv_cache_usage_perc",
        "vllm:gpu_cache_usage_perc",
        "sglang:token_usage",
        "llamacpp:kv_cache_usage_ratio",
        "aim_kv_cache_usage_ratio",
    )
)
_WANTED = RUNNING | WAITING | KV_USAGE
_MODEL_LABELS = ("model_name", "model")


@dataclass(frozen=True, slots=True)
class Load:
    """Requests in a server, whoever sent them; the fullest rank's share of the KV cache, None where it is not told."""

    running: int
    waiting: int
    kv_cache_usage: float | None


def read_load(text: str, model: str) -> Load | None:
    """What ``/metrics`` says of ``model``; None where it has none of the names known here.

    Ranks of data parallelism each have a sample: their requests add up. SGLang repeats a total by priority: only the
    total counts. One server's model may be labelled with its path: if no sample names ``model``, all count.
    """
    samples = list(_samples(text))
    ours = [sample for sample in samples if model in (sample[2].get(label) for label in _MODEL_LABELS)] or samples
    running = [value for name, value, _ in ours if name in RUNNING]
    if not running:
        return None
    usage = [value for name, value, _ in ours if name in KV_USAGE]
    return Load(
        int(sum(running)),
        int(sum(value for name, value, _ in ours if name in WAITING)),
        min(max(usage), 1.0) if usage else None,
    )


def _samples(text: str) -> Iterator[tuple[str, float, dict[str, str]]]:
    for family in text_string_to_metric_families("\n".join(_lines(text.splitlines())) + "\n"):
        for sample in family.samples:
            if not sample.labels.get("priority") and sample.value == sample.value:  # NaN: not known yet
                yield sample.name, sample.value, sample.labels


def _lines(lines: Iterable[str]) -> Iterator[str]:
    """Parsing all of vLLM's 400 samples for three of them would take milliseconds of every probe."""
    return (line for line in lines if line.partition("{")[0].partition(" ")[0] in _WANTED)
