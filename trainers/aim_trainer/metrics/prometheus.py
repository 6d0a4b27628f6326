"""`aim_trainer_*` on an HTTP port of the process of rank 0, for Prometheus to scrape."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import NamedTuple

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from .records import Evaluation, Note, Record, Saved, Step


class Prometheus:
    """A registry of its own, served at `/metrics` until it is closed. What was not told yet is not exposed.

    Args:
        about: labels of `aim_trainer_run_info`.
        port: 0: a free one, see `port`.

    Raises OSError: the port is taken, or is none of this machine's.
    """

    def __init__(self, port: int, about: dict[str, str], host: str = "0.0.0.0") -> None:
        self._state = _State(about)
        registry = CollectorRegistry()
        registry.register(self._state)
        self._server, self._thread = start_http_server(port, host, registry)
        self.port = int(self._server.server_port)
        self._closed = False

    def tell(self, record: Record) -> None:
        """Never fails: nothing is written anywhere until somebody scrapes."""
        self._state.tell(record)

    def close(self) -> None:
        """Frees the port."""
        if not self._closed:
            self._closed = True
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()


class _Gauge(NamedTuple):
    name: str
    help: str
    value: float | None


class _State(Collector):
    """The newest of each kind. Scrapes come on another thread; each reads a reference that is replaced as a whole."""

    def __init__(self, about: dict[str, str]) -> None:
        self._about = about
        self._step: Step | None = None
        self._tokens = (0, 0)
        self._saved: Saved | None = None
        self._saved_at = math.nan
        self._evaluated: dict[str, float] = {}

    def tell(self, record: Record) -> None:
        match record:
            case Step():
                self._tokens = (self._tokens[0] + record.tokens, self._tokens[1] + record.trained_tokens)
                self._step = record
            case Saved():
                self._saved_at = time.time()
                self._saved = record
            case Evaluation():
                self._evaluated = self._evaluated | record.metrics
            case Note():
                pass

    def collect(self) -> Iterator[Metric]:
        """What prometheus_client asks for at each scrape."""
        yield InfoMetricFamily("aim_trainer_run", "What is trained and how.", self._about)
        step, saved, evaluated = self._step, self._saved, self._evaluated
        if step is not None:
            yield from _gauges(_of_step(step))
            yield from self._counters()
        if saved is not None:
            yield from _gauges(self._of_saved(saved))
        if evaluated:
            family = GaugeMetricFamily("aim_trainer_evaluation", "Measures on held-out rows.", labels=["metric"])
            for name, value in sorted(evaluated.items()):
                family.add_metric([name], value)
            yield family

    def _counters(self) -> Iterator[Metric]:
        tokens, trained = self._tokens
        yield CounterMetricFamily(
            "aim_trainer_tokens", "Tokens computed by this process and its peers, padding left out.", tokens
        )
        yield CounterMetricFamily("aim_trainer_trained_tokens", "Those of them that the loss counts.", trained)

    def _of_saved(self, saved: Saved) -> list[_Gauge]:
        return [
            _Gauge("aim_trainer_checkpoint_age_seconds", "Time since a checkpoint was committed.", self._age_s()),
            _Gauge("aim_trainer_checkpoint_step", "The step of the last checkpoint.", saved.step),
            _Gauge("aim_trainer_checkpoint_size_bytes", "What the last checkpoint takes.", saved.bytes),
            _Gauge("aim_trainer_checkpoint_save_seconds", "What the last checkpoint took to write.", saved.seconds),
        ]

    def _age_s(self) -> float:
        return max(0.0, time.time() - self._saved_at)


def _of_step(step: Step) -> list[_Gauge]:
    return [
        _Gauge("aim_trainer_loss", "Mean loss over the trained tokens of the last step.", step.loss),
        _Gauge("aim_trainer_learning_rate", "Learning rate of the last step.", step.learning_rate),
        _Gauge("aim_trainer_gradient_norm", "Norm of the last step's gradients before clipping.", step.grad_norm),
        _Gauge("aim_trainer_tokens_per_second", "Tokens of the last step over its time.", step.tokens_per_second),
        _Gauge("aim_trainer_step", "Optimizer steps made.", step.step),
        _Gauge("aim_trainer_planned_steps", "Optimizer steps the run will have made at its end.", step.steps),
        _Gauge("aim_trainer_epoch", "Passes over the data made, as a fraction.", step.epoch),
        _Gauge("aim_trainer_eta_seconds", "Estimated time until the last step.", step.eta_s),
        _Gauge("aim_trainer_gpu_memory_bytes", "Peak of a GPU's memory in use.", step.gpu_memory_bytes),
    ]


def _gauges(gauges: list[_Gauge]) -> Iterator[Metric]:
    for gauge in gauges:
        if gauge.value is not None:
            yield GaugeMetricFamily(gauge.name, gauge.help, gauge.value)
