"""From a run's result to a version that can be served: weights, tokenizer, card, profile, policy, provenance.

Everything is made and proven in a directory of the run first; only then does the destination see any of it.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from aim_profile.models.facts import ModelFacts
from aim_profile.serving.profile import FineTuning
from aim_trainer.errors import StoreError
from aim_trainer.job.job import FineTuningJob
from aim_trainer.run_directory import RunDirectory

from . import adapter, card, classifier, models_file, policy, profile, weights
from .destinations.open import open_destination
from .provenance import Provenance, provenance_of
from .tokenizer import TEMPLATE, read_template, write_generation, write_tokenizer
from .versions import Version, publish_files

PROVENANCE = "provenance.json"
_SCRATCH = ".publishing-"


@dataclass(frozen=True, slots=True)
class Published:
    """version: v3; uri: where it is; digest: of its content; is_new: False where that content was there already;
    profile: the serving profile, in the run's directory, None where the job wants none.
    """

    version: str
    uri: str
    digest: str
    is_new: bool
    profile: Path | None


def publish(job: FineTuningJob, run: RunDirectory) -> Published:
    """The result of `run` as a new version in the job's registry, or the version that holds the same already.

    Whoever calls it holds `stopping.alone`. Raises JobError: what was trained cannot be served as the job wants it;
    StoreError: no result, or a place that cannot be used. The destination then has no new version.
    """
    if not run.result.is_dir():
        why = f"{run.result}: nothing was trained to its end there"
        raise StoreError(why, field=str(run.result), remedy="run or resume the job first")
    destination = open_destination(job.spec.output.registry, run.published)
    for left in run.root.glob(f"{_SCRATCH}*"):  # by a publisher that was killed; one at a time is at a run
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=run.root) as scratch:
        staged = Path(scratch, "version")
        staged.mkdir()
        _Stage(job, run, staged, Path(scratch)).fill()
        version = publish_files(staged, destination)
        return _published(version, run, staged)


def _published(version: Version, run: RunDirectory, staged: Path) -> Published:
    made, kept = staged / profile.FILE, run.root / profile.FILE
    if made.is_file():
        shutil.copyfile(made, kept)
    found = kept if made.is_file() else None
    return Published(version.name, version.uri, version.digest, version.is_new, found)


class _Stage:
    """The files of a version, made one after the other."""

    def __init__(self, job: FineTuningJob, run: RunDirectory, into: Path, scratch: Path) -> None:
        self._job, self._run, self._into, self._scratch = job, run, into, scratch
        self._files: dict[str, str] = {}

    def fill(self) -> None:
        output = self._job.spec.output
        if output.guardrail_policy is not None:
            policy.write_policy(output.guardrail_policy, self._into)
            self._files[policy.FILE] = "the guardrail's policy it is to be served behind"
        base = weights.base_files(self._job)
        tokenizer = weights.tuned_tokenizer(self._job)
        write_tokenizer(tokenizer, read_template(self._job.spec.dataset.chat_template), self._into)
        model = weights.tuned_model(self._job, self._run.result, tokenizer)
        origin = provenance_of(self._job, self._run, base)
        form = self._weights(model, tokenizer, base)
        self._say(origin, form, base)

    @property
    def _form(self) -> str:
        spec = self._job.spec
        if spec.template == "classification":
            return "classifier"
        whole = spec.method == "full" or spec.base_model.is_gguf
        return spec.output.format or ("merged" if whole else "adapter")

    def _weights(self, model: Any, tokenizer: Any, base: Path) -> str:
        form = self._form
        if form == "classifier":
            self._classifier(weights.merged(model))
            return form
        before = model.generation_config.to_diff_dict()
        if form == "adapter":
            write_generation(tokenizer, before, self._into)
            adapter.write_adapter(self._run.result, self._job.spec.base_model, self._into)
            self._files[adapter.WEIGHTS] = "the LoRA adapter, in PEFT's form"
        if form == "merged" or self._job.spec.output.gguf:
            whole = self._into if form == "merged" else self._scratch / "merged"
            whole.mkdir(exist_ok=True)
            weights.write_merged(weights.merged(model), whole)
            write_generation(tokenizer, before, whole)
            self._merged(whole)
        return form

    def _merged(self, into: Path) -> None:
        if into == self._into:
            self._files["model.safetensors"] = "the whole model"
        if self._job.spec.output.gguf:
            self._gguf(into)

    def _gguf(self, whole: Path) -> None:
        from .gguf.write import write_gguf

        for name in ("tokenizer.json", "tokenizer_config.json", TEMPLATE):
            if whole != self._into and (self._into / name).is_file():
                shutil.copyfile(self._into / name, whole / name)
        (self._into / "gguf").mkdir()
        write_gguf(whole, self._into / self._gguf_file, name=self._job.metadata.name)
        self._files[self._gguf_file] = "the whole model for the embedded engine, f16"

    @property
    def _gguf_file(self) -> str:
        return f"gguf/{self._job.metadata.name}-f16.gguf"

    def _classifier(self, model: Any) -> None:
        classifier.write_classifier(model, self._into)
        classifier.write_snippet(self._job.spec.dataset.labels, self._job.metadata.name, self._into)
        self._files |= {
            classifier.GRAPH: "the classifier, checked against torch",
            classifier.POLICY: "a guardrail policy that names it",
        }

    def _say(self, origin: Provenance, form: str, base: Path) -> None:
        if form != "classifier":
            self._serving(origin, form, base)
        said = json.dumps(asdict(origin), indent=2, sort_keys=True) + "\n"
        (self._into / PROVENANCE).write_text(said, encoding="utf-8")
        self._files[PROVENANCE] = "digests, versions and metrics, for machines"
        (self._into / card.FILE).write_text(card.card(self._job, origin, form, self._files), encoding="utf-8")

    def _serving(self, origin: Provenance, form: str, base: Path) -> None:
        spec, name = self._job.spec, self._job.metadata.name
        loaded = name if form == "merged" else spec.base_model.model_id
        facts = profile.facts_of(self._into if form == "merged" else base, loaded)
        length = profile.context_of(origin, facts.max_positions if isinstance(facts, ModelFacts) else None)
        rank = adapter.served_rank(spec.hyperparameters.lora_rank)
        if spec.output.profile == "auto-generate":
            slots = {"lora_slots": 1, "lora_rank": rank} if form == "adapter" else {"lora_slots": 0}
            tuned = FineTuning(**slots, provenance=profile.served_from(origin))
            made = profile.serving_profile(facts, loaded, length, tuned, spec.base_model.profile)
            (self._into / profile.FILE).write_text(profile.as_file(made, length), encoding="utf-8")
            self._files[profile.FILE] = "how it is served: arguments, partition, where it comes from"
        self._models(form, rank, length.tokens)

    def _models(self, form: str, rank: int, tokens: int) -> None:
        base, name = self._job.spec.base_model.model_id, self._job.metadata.name
        local = models_file.is_local(base)
        text = models_file.merged_models(name, tokens)
        if form == "adapter":
            place = models_file.local_path(base) if local else base
            text = models_file.adapter_models(name, place, local, rank, tokens)
        written = {models_file.FILE: text}
        if self._job.spec.output.gguf:
            written[models_file.EMBEDDED] = models_file.gguf_models(name, self._gguf_file, tokens)
        for file, content in written.items():
            (self._into / file).write_text(content, encoding="utf-8")
            self._files[file] = f"serves it: aim-runtime --models {file}"
