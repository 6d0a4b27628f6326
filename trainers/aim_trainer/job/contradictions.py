"""Fields that are right by themselves and wrong together. Each is told at the field to change, with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from aim_profile.files.place import Place

from .judged import LOWER_IS_BETTER, Metric
from .override import problem_with

if TYPE_CHECKING:
    from .job import Spec

Told = Iterator[tuple[Place, str]]

_OF_CLASSIFICATION = ("accuracy", "f1")
_OF_TEXT = ("perplexity", "exact_match", "rouge_l", "regressions", "guardrail_blocked")


def contradictions(spec: Spec) -> Told:
    """Places (from spec on) and reasons, the plainest first."""
    for find in (
        _method,
        _sharding,
        _batches,
        _template,
        _measures,
        _gates,
        _held_rows,
        _best,
        _output,
        _kueue,
        _search,
    ):
        yield from find(spec)


def _method(spec: Spec) -> Told:
    if spec.quantization and spec.method != "qlora":
        yield ("quantization",), f"is of method qlora (method is {spec.method}): leave one of them out"
    if spec.method == "full" and (given := spec.hyperparameters.set_for_lora()):
        yield ("hyperparameters", given[0]), "is of methods lora and qlora (method is full): leave it out"


def _sharding(spec: Spec) -> Told:
    asked = spec.distributed
    if asked.strategy != "fsdp2":
        return
    if spec.method == "qlora":
        why = "fsdp2 shards no quantized weights; use ddp, or method lora, whose weights it does shard"
        yield ("distributed", "strategy"), why
    if asked.workers == 1:
        yield ("distributed", "strategy"), "fsdp2 shards over workers, and there is one: use ddp, or more workers"


def _batches(spec: Spec) -> Told:
    hyper, workers = spec.hyperparameters, spec.distributed.workers
    if hyper.global_batch_size is None:
        return
    rows = workers if hyper.batch_size == "auto" else hyper.batch_size * workers
    if hyper.global_batch_size % rows:
        of = f"{workers} workers" if hyper.batch_size == "auto" else f"batchSize {hyper.batch_size} × {workers} workers"
        near = max(hyper.global_batch_size // rows, 1) * rows
        yield (
            ("hyperparameters", "globalBatchSize"),
            f"{hyper.global_batch_size} does not divide by {of} = {rows} rows a step; {near} or {near + rows} does",
        )


def _template(spec: Spec) -> Told:
    asked, classes = spec.dataset, spec.template == "classification"
    if not classes:
        if asked.labels:
            yield ("dataset", "labels"), f"are of template classification (template is {spec.template})"
        for place, named in asked.formats():
            if named == "classification":
                yield ("dataset", *place), f"classification is of template classification (template is {spec.template})"
        return
    if len(asked.labels) < 2:
        yield ("dataset", "labels"), "a classification needs its labels, two or more, in the order of the outputs"
    if asked.packing:
        yield ("dataset", "packing"), "a classification judges whole rows: they are not packed"
    if asked.train_on != "assistant":
        yield ("dataset", "trainOn"), "a classification learns labels, not tokens: leave it out"
    for place, named in asked.formats():
        if named not in ("auto", "classification"):
            yield ("dataset", *place), f"a classification needs rows with a label (format is {named})"


def _measures(spec: Spec) -> Told:
    asked = spec.validation
    classes = spec.template == "classification"
    for at, metric in enumerate(asked.metrics):
        if metric in (_OF_TEXT if classes else _OF_CLASSIFICATION):
            yield ("validation", "metrics", at), f"{metric} cannot be measured of template {spec.template}"
    for metric, key, given in (
        ("regressions", "regressionPrompts", asked.regression_prompts),
        ("guardrail_blocked", "guardrail", asked.guardrail),
    ):
        if metric in asked.metrics and given is None:
            yield ("validation", "metrics", asked.metrics.index(metric)), f"{metric} needs validation.{key}"
        if metric not in asked.metrics and given is not None:
            yield ("validation", key), f"measures {metric}, which validation.metrics does not name: add it there"
    for at, gate in enumerate(asked.gates):
        if gate.metric not in asked.metrics:
            why = f"{gate.metric} is not measured: add it to validation.metrics"
            yield ("validation", "gates", at, "metric"), why


def _gates(spec: Spec) -> Told:
    """Two gates of one metric that no value passes both; what is wrong in one alone is told by `judged.Gate`."""
    gates = spec.validation.gates
    for at, gate in enumerate(gates):
        for other_at, other in enumerate(gates):
            if other.metric != gate.metric or other_at == at:
                continue
            bounds = (("min", gate.min, "max", other.max), ("minDelta", gate.min_delta, "maxDelta", other.max_delta))
            for key, least, other_key, most in bounds:
                if least is not None and most is not None and least > most:
                    told = f"{least:g} is above gates[{other_at}].{other_key}, {most:g}: no {gate.metric} passes both"
                    yield ("validation", "gates", at, key), told


def _held_rows(spec: Spec) -> Told:
    """Without held-out rows nothing is measured on them; regression prompts have rows of their own."""
    if spec.dataset.validation.any:
        return
    needs = "needs held-out rows: give dataset.validation a source, or a share above 0"
    for at, gate in enumerate(spec.validation.gates):
        if gate.metric != "regressions":
            yield ("validation", "gates", at, "metric"), f"{gate.metric} {needs}"
    if spec.checkpoints.keep_best:
        yield ("checkpoints", "keepBest"), f"{spec.checkpoints.keep_best.metric} {needs}"
    if spec.search:
        yield ("search", "objective"), f"{spec.search.objective.metric} {needs}"


def _best(spec: Spec) -> Told:
    best, search = spec.checkpoints.keep_best, spec.search
    asked: list[tuple[tuple[str, str], str, Metric, str]] = []
    if best:
        asked.append((("checkpoints", "keepBest"), "mode", best.metric, best.mode))
    if search:
        aim = search.objective
        asked.append((("search", "objective"), "direction", aim.metric, aim.direction[:3]))
    for place, key, metric, way in asked:
        if metric not in spec.validation.metrics:
            yield (*place, "metric"), f"{metric} is not measured: add it to validation.metrics"
        if way != ("min" if metric in LOWER_IS_BETTER else "max"):
            yield (*place, key), f"{metric} is better {'lower' if metric in LOWER_IS_BETTER else 'higher'}"


def _output(spec: Spec) -> Told:
    asked = spec.output
    if asked.format == "adapter" and spec.method == "full":
        yield ("output", "format"), "full tuning makes no adapter: write merged, or leave it out"
    if asked.format == "adapter" and spec.base_model.is_gguf:
        why = "vLLM, which serves adapters, takes no GGUF file as their base: write merged, or leave it out"
        yield ("output", "format"), why
    if spec.template == "classification":
        if asked.format == "adapter":
            yield ("output", "format"), "a classification is published whole, as ONNX: write merged, or leave it out"
        if asked.gguf:
            yield ("output", "gguf"), "llama.cpp runs no classification head: leave it out"


def _kueue(spec: Spec) -> Told:
    if spec.resources.queue and spec.suspend:
        yield ("suspend",), "Kueue owns it where resources.queue is given: leave it out"


def _search(spec: Spec) -> Told:
    for at, parameter in enumerate(spec.search.parameters if spec.search else ()):
        for value in parameter.search_space.ends():
            if why := problem_with(spec, parameter.name, value):
                yield ("search", "parameters", at, "name"), why
                return
