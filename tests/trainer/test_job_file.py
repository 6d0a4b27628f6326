"""A job's file: what is read, how a mistake is told, what is set anew from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aim_profile.files.write import dump
from aim_trainer.errors import JobError
from aim_trainer.job.job import FineTuningJob
from aim_trainer.job.read import as_yaml, read_job

JOB = """\
apiVersion: aim.amd.com/v1alpha1
kind: FineTuningJob
metadata: {name: support-bot}
spec:
  baseModel: {modelId: HuggingFaceTB/SmolLM2-135M-Instruct}
  dataset: {source: chats.jsonl}
  hyperparameters:
    learningRate: 0.001
"""
HEAD = JOB[: JOB.index("  dataset")]


def written(folder: Path, text: str) -> Path:
    file = folder / "job.yaml"
    file.write_text(text)
    return file


def refused(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(JobError) as told:
        read_job(written(folder, text), overrides)
    return str(told.value).removeprefix(f"{folder}/")


def test_a_job_is_read_with_its_defaults(tmp_path: Path) -> None:
    job = read_job(written(tmp_path, JOB))
    assert (job.metadata.name, job.spec.method) == ("support-bot", "lora")
    assert (job.spec.hyperparameters.learning_rate, job.spec.hyperparameters.lora_rank) == (0.001, 16)
    assert job.spec.hyperparameters.target_modules == "all-linear"
    assert [source.uri for source in job.spec.dataset.all_sources()] == ["chats.jsonl"]


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("learningRate", "learningRat", "job.yaml:8: spec.hyperparameters.learningRat: unknown key; did you mean"),
        ("modelId", "modelIdd", "job.yaml:5: spec.baseModel.modelIdd: unknown key; did you mean modelId?"),
        ("0.001", "-1", "job.yaml:8: spec.hyperparameters.learningRate: Input should be greater than 0 (got -1)"),
        ("0.001", "true", "job.yaml:8: spec.hyperparameters.learningRate: a number is needed (got true)"),
        ("0.001", ".nan", "job.yaml:8: spec.hyperparameters.learningRate: Input should be a finite number (got nan)"),
        ("FineTuningJob", "TrainJob", "job.yaml:2: kind: Input should be 'FineTuningJob' (got 'TrainJob')"),
        ("{name: support-bot}", "{name: a, labels: {a b: c}}", "job.yaml:3: metadata.labels.a b: String should match"),
        (
            "{name: support-bot}",
            '{name: a, labels: {a: "b\\nc"}}',
            "job.yaml:3: metadata.labels.a: String should match",
        ),
        ("{name: support-bot}", "{name: a, annotations: {a/b/c: d}}", "job.yaml:3: metadata.annotations.a/b/c: String"),
        ("support-bot", "Support_Bot", "job.yaml:3: metadata.name: String should match pattern"),
        ("chats.jsonl", "ftp://x/y", "job.yaml:6: spec.dataset.source: ftp:// cannot be used here; a path, or one of"),
    ],
)
def test_a_mistake_is_told_with_its_line(tmp_path: Path, old: str, new: str, told: str) -> None:
    assert refused(tmp_path, JOB.replace(old, new)).startswith(told)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ("doRA: true", "hyperparameters.doRA: vLLM loads no adapter made with DoRA"),
        ("modulesToSave: [lm_head]", "hyperparameters.modulesToSave: vLLM loads no adapter with modules_to_save"),
        ("bias: all", "hyperparameters.bias: vLLM loads no adapter that trains biases"),
        ("loraRank: 513", "hyperparameters.loraRank: Input should be less than or equal to 512 (got 513)"),
        ("loraAlpha: .inf", "hyperparameters.loraAlpha: Input should be"),
        ("warmup: 2.5", "hyperparameters.warmup: from 1 on it counts steps, which are whole"),
        ("{warmup: 9, maxSteps: 5}", "hyperparameters.warmup: 9 steps of 5 (maxSteps): none is left"),
        ("batchSize: 0", "hyperparameters.batchSize: Input should be greater than or equal to 1 (got 0)"),
        ("seed: 2147483648", "hyperparameters.seed: 2147483648 is more than 32 bits hold"),
        ("{batchSize: 3, globalBatchSize: 8}", "8 does not divide by batchSize 3 × 1 workers = 3 rows a step; 6 or 9"),
        ("loraTargetModules: [all-linear, q_proj]", "hyperparameters.loraTargetModules: all-linear names every linear"),
        ("gradientCheckpointing: 'yes'", "hyperparameters.gradientCheckpointing: Input should be a valid boolean"),
    ],
)
def test_hyperparameters_that_cannot_be(tmp_path: Path, keys: str, told: str) -> None:
    spec = f"  hyperparameters: {keys if keys.startswith('{') else '{' + keys + '}'}\n"
    found = refused(tmp_path, HEAD + "  dataset: {source: chats.jsonl}\n" + spec)
    assert found.startswith("job.yaml:7: spec.hyperparameters.")
    assert told in found


CHATS = "dataset: {source: chats.jsonl}\n"
CLASSES = "template: classification\ndataset: {source: rows.csv, labels: [good, bad]}\n"


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        (CHATS + "quantization: nf4", ":7: spec.quantization: is of method qlora (method is lora)"),
        (
            CHATS + "method: full\nhyperparameters: {loraRank: 8}",
            ":8: spec.hyperparameters.loraRank: is of methods lora",
        ),
        (
            CHATS + "method: qlora\ndistributed: {strategy: fsdp2, workers: 2}",
            ":8: spec.distributed.strategy: fsdp2 shards no",
        ),
        (
            CHATS + "distributed: {strategy: fsdp2}",
            ":7: spec.distributed.strategy: fsdp2 shards over workers, and there is one",
        ),
        (
            CHATS + "distributed: {strategy: deepspeed}",
            ":7: spec.distributed.strategy: deepspeed is not built in; fsdp2",
        ),
        (
            CHATS + "distributed: {workers: 3}\nhyperparameters: {globalBatchSize: 32}",
            "32 does not divide by 3 workers = 3 rows",
        ),
        (CHATS + "template: classification", ":6: spec.dataset.labels: a classification needs its labels, two or more"),
        (
            "dataset: {source: x.csv, labels: [a, b]}",
            ":6: spec.dataset.labels: are of template classification (template is chat)",
        ),
        ("dataset: {source: x.csv, format: classification}", ":6: spec.dataset.format: classification is of template"),
        (
            "template: classification\ndataset: {source: x.csv, labels: [a, a]}",
            ":7: spec.dataset.labels[1]: 'a' stands there twice",
        ),
        (
            "template: classification\ndataset: {source: x.csv, labels: [a, b], packing: true}",
            ":7: spec.dataset.packing: ",
        ),
        (CLASSES + "output: {gguf: true}", ":8: spec.output.gguf: llama.cpp runs no classification head"),
        (CLASSES + "output: {format: adapter}", ":8: spec.output.format: a classification is published whole, as ONNX"),
        (
            CLASSES + "validation: {metrics: [rouge_l]}",
            ":8: spec.validation.metrics[0]: rouge_l cannot be measured of template",
        ),
        (CHATS + "method: full\noutput: {format: adapter}", ":8: spec.output.format: full tuning makes no adapter"),
        (
            CHATS + "validation: {gates: [{metric: rouge_l, min: 0.2}]}",
            ":7: spec.validation.gates[0].metric: rouge_l is not measured",
        ),
        (CHATS + "validation: {gates: [{metric: eval_loss}]}", ":7: spec.validation.gates[0]: a gate needs min, max"),
        (
            CHATS + "validation: {gates: [{metric: eval_loss, max: 1}, {metric: eval_loss, min: 2}]}",
            ":7: spec.validation.gates[1].min: 2 is above gates[0].max, 1: no eval_loss passes both",
        ),
        (
            CHATS + "validation: {gates: [{metric: eval_loss, minDelta: 0}, {metric: eval_loss, maxDelta: -0.5}]}",
            ":7: spec.validation.gates[0].minDelta: 0 is above gates[1].maxDelta, -0.5: no eval_loss passes both",
        ),
        (
            CHATS + "validation: {metrics: [exact_match], gates: [{metric: exact_match, min: 80}]}",
            ":7: spec.validation.gates[0].min: exact_match is a share, 1 at most (got 80): no value passes",
        ),
        (
            CHATS + "validation: {gates: [{metric: eval_loss, max: -1}]}",
            ":7: spec.validation.gates[0].max: eval_loss is 0 at least (got -1): no value passes",
        ),
        (
            CHATS + "validation: {gates: [{metric: eval_loss, min: 2, max: 1}]}",
            ":7: spec.validation.gates[0].min: 2 is",
        ),
        (
            CHATS + "validation: {metrics: [regressions]}",
            ":7: spec.validation.metrics[0]: regressions needs validation",
        ),
        (
            CHATS + "validation: {regressionPrompts: r.jsonl}",
            ":7: spec.validation.regressionPrompts: measures regressions, which",
        ),
        (
            "dataset: {source: x.jsonl, validation: {share: 0}}\ncheckpoints: {keepBest: {}}",
            ":7: spec.checkpoints.keepBest: eval_loss needs held-out rows",
        ),
        (
            "dataset: {source: x.jsonl, validation: {source: y.jsonl, share: 0.1}}",
            ":6: spec.dataset.validation.share: a source of",
        ),
        (
            CHATS + "checkpoints: {keepBest: {metric: eval_loss, mode: max}}",
            ":7: spec.checkpoints.keepBest.mode: eval_loss is better lower",
        ),
        (CHATS + "suspend: true\nresources: {queue: team-a}", ":7: spec.suspend: Kueue owns it"),
        (CHATS + "resources: {memory: 16 gigs}", ":7: spec.resources.memory: String should match pattern"),
        (CHATS + "checkpoints: {uri: 's3://'}", ":7: spec.checkpoints.uri: 's3://': give s3://BUCKET/PREFIX"),
        (
            CHATS + "output: {registry: 'oci://host/bot:v1'}",
            ":7: spec.output.registry: 'oci://host/bot:v1': give oci://HOST/REPOSITORY, without a tag or revision",
        ),
        (CHATS + "output: {registry: 'hf://org'}", ":7: spec.output.registry: 'hf://org': give hf://ORG/NAME"),
        ("dataset: {}", ":6: spec.dataset: give source, or sources"),
        (
            "dataset: {sources: [{uri: a.jsonl}], format: alpaca}",
            ":6: spec.dataset.format: stands at each of sources, not beside them",
        ),
        (
            CHATS + "search: {parameters: [{name: hyperparameters.loraRnk, searchSpace: {uniform: {min: 4, max: 8}}}]}",
            ":7: spec.search.parameters[0].name: hyperparameters.loraRnk: 4.0: there is no such field; "
            "did you mean loraRank?",
        ),
        (
            CHATS + "search: {parameters: [{name: hyperparameters.loraRank, searchSpace: {categorical: [8, 1024]}}]}",
            ":7: spec.search.parameters[0].name: hyperparameters.loraRank: 1024: Input should be less than or equal",
        ),
        (
            CHATS + "search: {parameters: [{name: hyperparameters.seed, searchSpace: {logUniform: {min: 0, max: 9}}}]}",
            ":7: spec.search.parameters[0].searchSpace.logUniform.min: no logarithm of 0",
        ),
    ],
)
def test_fields_that_contradict_each_other(tmp_path: Path, spec: str, told: str) -> None:
    text = HEAD + "".join(f"  {line}\n" for line in spec.splitlines())
    assert told in refused(tmp_path, text)


def test_a_classification_is_measured_by_what_fits_it(tmp_path: Path) -> None:
    text = HEAD + "".join(f"  {line}\n" for line in CLASSES.splitlines())
    job = read_job(written(tmp_path, text))
    assert job.spec.validation.metrics == ["eval_loss", "accuracy", "f1"]


def test_what_a_cluster_adds_to_a_job_is_read_past(tmp_path: Path) -> None:
    """The output of `kubectl get finetuningjob support-bot -o yaml`."""
    added = "metadata:\n  name: support-bot\n  uid: 1-2\n  resourceVersion: '7'\n  creationTimestamp: 2026-01-01\n"
    text = JOB.replace("metadata: {name: support-bot}\n", added) + "status: {trainerStatus: {progressPercentage: 5}}\n"
    job = read_job(written(tmp_path, text))
    assert job == read_job(written(tmp_path, JOB))
    assert "status" not in as_yaml(job)
    assert refused(tmp_path, text.replace("uid", "uidd")).startswith("job.yaml:5: metadata.uidd: unknown key")


def test_single_values_are_set_from_the_command_line(tmp_path: Path) -> None:
    file = written(tmp_path, JOB)
    job = read_job(file, ["spec.hyperparameters.learningRate=1e-4", "spec.distributed.workers=2", "spec.method=full"])
    assert (job.spec.hyperparameters.learning_rate, job.spec.distributed.workers) == (1e-4, 2)
    assert read_job(file, ["spec.hyperparameters.learningRate=null"]).spec.hyperparameters.learning_rate == 2e-4


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("spec.hyperparameters.learningRat=1", "--set spec.hyperparameters.learningRat=1: unknown key; did you mean"),
        ("spec." + "a." * 2000 + "b=1", "--set spec.a.a."),
        ("spec.hyperparameters.loraRank=0", "--set spec.hyperparameters.loraRank=0: Input should be greater than"),
        ("spec.output={gguff: 1}", "--set spec.output={gguff: 1}: gguff: unknown key; did you mean gguf?"),
        ("spec.hyperparameters.learningRate.x=1", "--set spec.hyperparameters.learningRate.x=1: the job has nothing"),
        ("spec.dataset.sources[0].weight=2", "--set spec.dataset.sources[0].weight=2: the job has nothing to set it"),
        ("learning rate=1", "--set learning rate=1: 'learning rate' is no path of keys"),
        ("spec.method", "--set spec.method: no ="),
        ("spec.method=[", "--set spec.method=[:2: not YAML"),
    ],
)
def test_what_cannot_be_set_is_told_by_what_was_asked(tmp_path: Path, override: str, told: str) -> None:
    assert refused(tmp_path, JOB, override).startswith(told)


OPTIONAL: dict[str, st.SearchStrategy[Any]] = {
    "learningRate": st.floats(1e-9, 1),
    "warmup": st.floats(0, 0.9) | st.integers(1, 1000),
    "epochs": st.floats(1e-3, 1000),
    "maxSteps": st.integers(1001, 2**31 - 1),
    "batchSize": st.just("auto") | st.integers(1, 65_536),
    "seed": st.integers(0, 2**31 - 1),
    "loraRank": st.integers(1, 512),
    "loraTargetModules": st.lists(st.sampled_from(["q_proj", "v_proj"]), min_size=1, max_size=2),
    "rslora": st.booleans(),
    "schedule": st.sampled_from(["cosine", "linear", "constant"]),
}
TEXT = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=30).filter(lambda t: "://" not in t)


@given(st.fixed_dictionaries({}, optional=OPTIONAL), TEXT, st.dictionaries(TEXT, TEXT, max_size=3), st.booleans())
def test_what_is_written_is_read_as_the_same_job(
    tmp_path_factory: pytest.TempPathFactory, hyper: dict[str, Any], source: str, columns: dict[str, str], gguf: bool
) -> None:
    raw = {
        "apiVersion": "aim.amd.com/v1alpha1",
        "kind": "FineTuningJob",
        "metadata": {"name": "a"},
        "spec": {
            "baseModel": {"modelId": "org/model"},
            "dataset": {"source": source, "columns": columns},
            "hyperparameters": hyper,
            "output": {"gguf": gguf},
        },
    }
    job = FineTuningJob.model_validate(raw)
    file = tmp_path_factory.getbasetemp() / "round.yaml"
    file.write_text(as_yaml(job))
    assert read_job(file) == job
    file.write_text(dump(raw))
    assert read_job(file) == job


def test_an_adapter_over_a_gguf_file_has_no_base_to_be_served_on(tmp_path: Path) -> None:
    over_gguf = JOB.replace("HuggingFaceTB/SmolLM2-135M-Instruct", "models/smollm2.gguf")
    read_job(written(tmp_path, over_gguf + "  output: {format: merged}\n"))
    told = refused(tmp_path, over_gguf + "  output: {format: adapter}\n")
    assert "spec.output.format: vLLM, which serves adapters, takes no GGUF file as their base: write merged" in told
