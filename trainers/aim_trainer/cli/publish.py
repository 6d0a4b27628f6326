"""`aim-trainer publish`: a run's result as a version, once more or somewhere else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from aim_profile.cli.output import Facts, Output, show
from aim_trainer.errors import GateError, StoreError
from aim_trainer.job.job import FineTuningJob
from aim_trainer.job.read import read_job
from aim_trainer.publish.publish import publish
from aim_trainer.run_directory import RunDirectory
from aim_trainer.stopping import alone

_JUDGE = "judge it again: aim-trainer evaluate JOB RUN_DIR"


def publish_run(directory: Path, to: str | None, output: Output) -> None:
    """to: in place of the job's registry. Raises TrainerError: no run, a gate that failed, a place that is away."""
    run = RunDirectory(directory)
    if not run.job.is_file():
        raise StoreError(f"{directory}: no run is there", field="run", remedy="name the directory of a run")
    job = read_job(run.job)
    if to is not None:
        job = _published_to(job, to)
    with alone(run):
        _check_gates(job, run.evaluation)
        made = publish(job, run)
    profile = str(made.profile) if made.profile else None
    data: dict[str, Any] = {"version": made.version, "uri": made.uri, "digest": made.digest, "new": made.is_new}
    facts = [
        ("published" if made.is_new else "there already", f"{made.uri} ({made.version})"),
        ("digest", made.digest),
        ("profile", profile or "none: output.profile is none, or it is a classifier"),
    ]
    show(output, data | {"profile": profile}, Facts(facts))


def _published_to(job: FineTuningJob, to: str) -> FineTuningJob:
    output = job.spec.output.model_copy(update={"registry": to})
    return job.model_copy(update={"spec": job.spec.model_copy(update={"output": output})})


def _check_gates(job: FineTuningJob, evaluation: Path) -> None:
    """Raises GateError: what failed a gate, or was never judged by those it has, is not published by another door."""
    if not evaluation.is_file():
        if job.spec.validation.gates:
            raise _gate_error(f"{evaluation.parent}: was not judged yet, and its job has gates")
        return
    try:
        gates = json.loads(evaluation.read_bytes()).get("gates") or []
        failed = [str(gate.get("metric")) for gate in gates if not gate.get("passed", True)]
    except (ValueError, AttributeError):
        raise StoreError(
            f"{evaluation}: not what judging leaves", field=str(evaluation), remedy=f"{_JUDGE}, which writes it anew"
        ) from None
    if failed:
        raise _gate_error(f"{evaluation}: the gates of {', '.join(failed)} failed")


def _gate_error(why: str) -> GateError:
    return GateError(why, field="spec.validation.gates", remedy=f"train better, or {_JUDGE} with other gates")
