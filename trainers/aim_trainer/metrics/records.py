"""What a run tells of itself; every sink is told the same."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step. loss: mean over the trained tokens of the global batch; tokens: those computed in this step
    over all workers, padding left out; learning_rate: what the step used.
    """

    step: int
    steps: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    trained_tokens: int
    seconds: float
    eta_s: float
    gpu_memory_bytes: int | None = None

    @property
    def tokens_per_second(self) -> float:
        """Of all workers together."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Measures on held-out rows after `step`; step 0: the base model."""

    step: int
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint that was committed."""

    step: int
    uri: str
    bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Note:
    """An event worth telling: started, resumed from a step, paused, retried, failed, done."""

    kind: str
    message: str
    fields: dict[str, object] = field(default_factory=dict)


Record = Step | Evaluation | Saved | Note


class Sink(Protocol):
    """Where records go. A place that is away is an OSError, which `AllSinks` keeps from training; `close` may be
    called twice.
    """

    def tell(self, record: Record) -> None: ...

    def close(self) -> None: ...
