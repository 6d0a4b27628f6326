"""The CEL rules of FineTuningJob's definition refuse what the models refuse, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from aim_trainer.job.job import FineTuningJob
from aim_trainer.job.schema import structural_schema
from crd_schemas import broken_rules

SCHEMA = structural_schema()
CLASSES = {"template": "classification", "dataset": {"source": "x.csv", "labels": ["good", "bad"]}}


def job(spec: dict[str, Any]) -> dict[str, Any]:
    base = {"baseModel": {"modelId": "a/b"}, "dataset": {"source": "x.jsonl"}}
    about = {"apiVersion": "aim.amd.com/v1alpha1", "kind": "FineTuningJob", "metadata": {"name": "bot"}}
    return {**about, "spec": base | spec}


def search(space: dict[str, Any]) -> dict[str, Any]:
    return {"search": {"parameters": [{"name": "hyperparameters.learningRate", "searchSpace": space}]}}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"quantization": "nf4"}, "quantization is of method qlora"),
    ({"quantization": "nf4", "method": "lora"}, "quantization is of method qlora"),
    ({"method": "qlora", "distributed": {"strategy": "fsdp2", "workers": 2}}, "fsdp2 shards no quantized weights"),
    ({"distributed": {"strategy": "fsdp2"}}, "fsdp2 shards over workers"),
    ({"method": "full", "output": {"format": "adapter"}}, "full tuning makes no adapter"),
    ({"baseModel": {"modelId": "m/x.gguf"}, "output": {"format": "adapter"}}, "vLLM takes no GGUF file as the base"),
    ({"template": "classification"}, "dataset.labels, two or more"),
    ({"dataset": {"source": "x.csv", "labels": ["good", "bad"]}}, "dataset.labels, two or more"),
    (CLASSES | {"dataset": {**CLASSES["dataset"], "packing": True}}, "they are not packed"),  # type: ignore[dict-item]
    ({"suspend": True, "resources": {"queue": "team"}}, "Kueue owns suspend"),
    ({"dataset": {}}, "give source, or sources"),
    ({"dataset": {"source": "a", "sources": [{"uri": "b"}]}}, "give source, or sources"),
    ({"hyperparameters": {"batchSize": 0}}, "batchSize is 1 to 65536, or auto"),
    ({"hyperparameters": {"batchSize": "many"}}, "batchSize is 1 to 65536, or auto"),
    ({"validation": {"gates": [{"metric": "eval_loss"}]}}, "a gate needs min, max, minDelta or maxDelta"),
    (search({"uniform": {"min": 0.2, "max": 0.1}}), "min must be below max"),
]
TAKEN: list[dict[str, Any]] = [
    {},
    {"method": "qlora", "quantization": "int8"},
    {"distributed": {"strategy": "fsdp2", "workers": 2}},
    {"method": "full", "output": {"format": "merged"}},
    {"baseModel": {"modelId": "m/x.gguf"}, "output": {"format": "merged"}},
    CLASSES,
    {"suspend": True, "resources": {"cpu": 2}},
    {"dataset": {"sources": [{"uri": "a"}, {"uri": "b", "weight": 0.5}]}},
    {"hyperparameters": {"batchSize": "auto"}},
    {"hyperparameters": {"batchSize": 65536}},
    {"validation": {"gates": [{"metric": "eval_loss", "maxDelta": -1}]}},
    search({"categorical": [1e-4, 1e-3]}),
    search({"logUniform": {"min": 1e-5, "max": 1e-3}}),
]


@pytest.mark.parametrize(("spec", "told"), REFUSED)
def test_the_server_refuses_what_the_models_refuse(spec: dict[str, Any], told: str) -> None:
    found = list(broken_rules(SCHEMA, job(spec), "$"))
    assert len(found) == 1
    assert told in found[0]
    with pytest.raises(ValidationError):
        FineTuningJob.model_validate(job(spec))


@pytest.mark.parametrize(
    ("name", "told"),
    [("1bot", "a letter first, then letters, digits and dashes"), ("b" * 48, "at most 47 characters")],
)
def test_the_server_refuses_names_that_the_models_refuse(name: str, told: str) -> None:
    named = job({}) | {"metadata": {"name": name}}
    assert list(broken_rules(SCHEMA, named, "$")) == [f"$: metadata.name: {told}"]
    with pytest.raises(ValidationError):
        FineTuningJob.model_validate(named)


@pytest.mark.parametrize("spec", TAKEN)
def test_the_server_takes_what_the_models_take(spec: dict[str, Any]) -> None:
    assert list(broken_rules(SCHEMA, job(spec), "$")) == []
    FineTuningJob.model_validate(job(spec))


def test_each_rule_is_seen_to_refuse() -> None:
    def messages(schema: dict[str, Any]) -> set[str]:
        below = [*schema.get("properties", {}).values(), *(schema[key] for key in ("items",) if key in schema)]
        own = {rule["message"] for rule in schema.get("x-kubernetes-validations", ())}
        return own.union(*(messages(each) for each in below))

    seen = {message for message in messages(SCHEMA) for _, told in REFUSED if told in message}
    assert {message for message in messages(SCHEMA) - seen if not message.startswith("metadata.name")} == set()
