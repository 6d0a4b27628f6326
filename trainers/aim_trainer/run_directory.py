"""Where a run keeps what it makes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunDirectory:
    """The paths; none is made here."""

    root: Path

    @property
    def job(self) -> Path:
        """The job as it was read, with what was set by the command line."""
        return self.root / "job.yaml"

    @property
    def lock(self) -> Path:
        """Held by the process that drives the run."""
        return self.root / "lock"

    @property
    def stop(self) -> Path:
        """Where it is, the workers end their step, save, and stop: SIGTERM makes it, `touch` does too."""
        return self.root / "stop"

    @property
    def batch_size(self) -> Path:
        """Rows of a micro-batch that were found to fit, where batchSize is auto."""
        return self.root / "batch_size.json"

    @property
    def tokenizer(self) -> Path:
        """The base model's, as a directory of Hugging Face's."""
        return self.root / "tokenizer"

    @property
    def ray(self) -> Path:
        """What Ray keeps of its own."""
        return self.root / "ray"

    @property
    def data(self) -> Path:
        """Tokenised rows: `train/<digest>`, `validation/<digest>`."""
        return self.root / "data"

    @property
    def checkpoints(self) -> Path:
        """Used where the job names no other place."""
        return self.root / "checkpoints"

    @property
    def metrics(self) -> Path:
        """A line of JSON for each record."""
        return self.root / "metrics.jsonl"

    @property
    def progress(self) -> Path:
        """Percent, step, loss, tokens/s, ETA: replaced as a whole, for a controller to read."""
        return self.root / "progress.json"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def result(self) -> Path:
        """The weights the last step ended with: an adapter, or the whole model."""
        return self.root / "result"

    @property
    def evaluation(self) -> Path:
        """Base and tuned model side by side, as JSON."""
        return self.root / "evaluation.json"

    @property
    def published(self) -> Path:
        """Used where the job names no registry."""
        return self.root / "published"

    @property
    def report(self) -> Path:
        return self.root / "report.html"
