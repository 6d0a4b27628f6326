"""Where weights come from: digests of the base model, the job and the data, the tools, what was measured."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aim_trainer.data.statistics import lengths
from aim_trainer.data.tokens import Tokens, newest
from aim_trainer.errors import StoreError
from aim_trainer.files import sha256_of
from aim_trainer.installed import versions_of
from aim_trainer.job.digest import spec_digest
from aim_trainer.job.job import FineTuningJob
from aim_trainer.run_directory import RunDirectory

_TOOLS = ("aim-kserve", "torch", "transformers", "peft", "bitsandbytes")
#: Of a directory, the files that decide what a model computes.
_DECIDE = ("*.safetensors", "pytorch_model*.bin", "config.json", "tokenizer.json", "*.gguf")


@dataclass(frozen=True, slots=True)
class Provenance:
    """digests: SHA-256 with their prefix. row_tokens: the 99.9th percentile of the training rows' lengths, and the
    longest; None where the run's data is gone. metrics: of base and tuned model, by name.
    """

    base: str
    revision: str | None
    method: str
    base_digest: str
    job_digest: str
    data_digest: str | None
    rows: int | None
    row_tokens: tuple[int, int] | None
    tools: Mapping[str, str]
    metrics: Mapping[str, tuple[float | None, float | None]]


def provenance_of(job: FineTuningJob, run: RunDirectory, base: Path) -> Provenance:
    """base: the directory or file of the base model. Raises StoreError: evaluation.json cannot be read."""
    data = newest(run.data / "train")
    tokens = Tokens(data) if data else None
    told = lengths(tokens) if tokens else None
    return Provenance(
        base=job.spec.base_model.model_id,
        revision=job.spec.base_model.revision,
        method=job.spec.method,
        base_digest=model_digest(base),
        job_digest=_prefixed(spec_digest(job)),
        data_digest=_prefixed(data.name) if data else None,
        rows=len(tokens) if tokens else None,
        row_tokens=(told.p99_9, told.max) if told else None,
        tools=versions_of(_TOOLS),
        metrics=metrics_of(run.evaluation),
    )


def model_digest(base: Path) -> str:
    """Of the weights, configuration and tokenizer; reads them all. Not of where they stand."""
    files = [base] if base.is_file() else sorted({file for pattern in _DECIDE for file in base.glob(pattern)})
    whole = "".join(f"{'' if base.is_file() else file.name}\0{sha256_of(file)}\n" for file in files)
    return f"sha256:{hashlib.sha256(whole.encode()).hexdigest()}"


def metrics_of(evaluation: Path) -> dict[str, tuple[float | None, float | None]]:
    """Name → (base, tuned) of a run's evaluation.json; empty where it was not judged. Raises StoreError."""
    if not evaluation.is_file():
        return {}
    try:
        raw: dict[str, Any] = json.loads(evaluation.read_text(encoding="utf-8"))
        base, tuned = raw.get("base") or {}, raw.get("tuned") or {}
        names = dict.fromkeys((*base, *tuned))
        return {name: (_number(base.get(name)), _number(tuned.get(name))) for name in names}
    except (OSError, ValueError, AttributeError) as problem:
        raise StoreError(
            f"{evaluation}: not the result of an evaluation: {problem}", field=str(evaluation), remedy="evaluate again"
        ) from problem


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _prefixed(digest: str) -> str:
    return digest if digest.startswith("sha256:") else f"sha256:{digest}"
