"""Runs that can be published: a tiny or small model trained for a few steps, its run directory as a run leaves it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aim_trainer.data.tokens import Tokens
from aim_trainer.job.job import FineTuningJob
from aim_trainer.publish.gguf.write import write_gguf
from aim_trainer.recipe.model import save
from aim_trainer.run_directory import RunDirectory
from tiny_models import END_ID
from tiny_runs import run_tiny, tiny_job

METRICS = {"base": {"eval_loss": 6.25, "perplexity": 518.0}, "tuned": {"eval_loss": 1.5, "perplexity": 4.48}}


def job_of(model: Path, output: Mapping[str, Any], method: str = "lora", **changed: Any) -> FineTuningJob:
    """As `tiny_job`, with an output and a name."""
    raw = tiny_job(model, method, **changed).model_dump(mode="json", by_alias=True, exclude_unset=True)
    raw["spec"]["output"] = dict(output)
    raw["metadata"]["name"] = "support-bot"
    return FineTuningJob.model_validate(raw)


def tiny_gguf(model: Path, folder: Path) -> Path:
    """The tiny Llama as a file in f16, which holds its weights within a thousandth."""
    shutil.copytree(model, folder / "model")
    (folder / "model/generation_config.json").write_text(json.dumps({"eos_token_id": END_ID}))
    write_gguf(folder / "model", folder / "tiny.gguf", name="tiny")
    return folder / "tiny.gguf"


def trained(job: FineTuningJob, root: Path, rows: Tokens) -> RunDirectory:
    """rows: in `root/data/train/DIGEST`."""
    run = RunDirectory(root)
    ran = run_tiny(job, rows, run.checkpoints)
    save(ran.loaded, run.result)
    run.evaluation.write_text(json.dumps(METRICS))
    return run
