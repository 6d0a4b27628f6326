"""`aim-trainer plan`: what a job takes, how many steps it is, where it fits and how long it lasts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from aim_profile.cli.output import Facts, Output, Table, show
from aim_profile.files.write import dump
from aim_profile.gpus.catalog import Accelerator, by_name, catalog
from aim_profile.gpus.modes import PartitionMode
from aim_profile.models.facts import ModelFacts
from aim_profile.sizing.fit import DEFAULT_UTILIZATION, budget_bytes
from aim_profile.units import gib
from aim_trainer.errors import JobError
from aim_trainer.job.job import FineTuningJob
from aim_trainer.job.memory import batch_that_fits, facts_of, needed, on_cpu, training_of
from aim_trainer.job.override import with_parameters
from aim_trainer.job.read import read_job
from aim_trainer.job.remedies import remedies
from aim_trainer.job.steps import Arithmetic, batches
from aim_trainer.metrics.json_lines import read_records
from aim_trainer.metrics.records import Step
from aim_trainer.metrics.words import seconds_in_words
from aim_trainer.run_directory import RunDirectory

_PARTS = ("weights", "copies", "adapter", "gradients", "optimizer", "activations", "logits", "runtime")
#: Steps of a run that are left out of its median: the first are slower.
_WARMING_STEPS = 3


class Place(NamedTuple):
    """A device the job may go to. rows: of one pass; 0 where it does not fit, then short_bytes is what is missing."""

    gpu: str
    mode: str
    tier: str
    device_bytes: int
    rows: int
    need_bytes: int
    short_bytes: int


class Plan(NamedTuple):
    job: FineTuningJob
    facts: ModelFacts
    places: list[Place]
    rows: int | None
    steps: Arithmetic | str
    time: str
    would_help: list[str]

    @property
    def fits(self) -> bool:
        """Somewhere; of a job without GPUs nothing is said."""
        return not self.places or any(place.rows for place in self.places)


def plan(job: FineTuningJob, gpu: str | None, rows: int | None, measured: Path | None) -> Plan:
    """gpu: also for a job without GPUs, which is then planned with one for each worker; rows: to train on, where they
    are known; measured: the directory of a run of the same job.

    Raises AimProfileError: an unknown model or GPU, a run of another job.
    """
    facts = facts_of(job)
    if gpu and on_cpu(job):
        job = with_parameters(job, {"resources.gpu": 1})
    gpus = [by_name(gpu)] if gpu else [] if on_cpu(job) else list(catalog().values())
    places = [_place(job, facts, accelerator, mode) for accelerator in gpus for mode in accelerator.modes()]
    shown = places if gpu else _smallest_of_each(places)
    steps = _steps(job, rows, [place.rows for place in shown if place.rows])
    time = _time(job, steps, measured)
    largest = max((place.device_bytes for place in shown), default=0)
    fits = not shown or any(place.rows for place in shown)
    return Plan(job, facts, shown, rows, steps, time, [] if fits else remedies(job, facts, largest))


def tell(made: Plan, output: Output) -> None:
    """For people, or as JSON or YAML."""
    taken = needed(made.job, made.facts)
    need, total = taken._asdict(), taken.total
    rows = made.job.spec.hyperparameters.batch_size
    memory = {f"{part}_gib": gib(need[part]) for part in _PARTS}
    steps = made.steps._asdict() if isinstance(made.steps, Arithmetic) else made.steps
    data = {
        "job": made.job.metadata.name,
        "model": made.facts.id,
        "method": made.job.spec.method,
        "memory": memory | {"total_gib": gib(total), "batch": 1 if rows == "auto" else rows},
        "places": [_place_data(place) for place in made.places],
        "rows": made.rows,
        "steps": steps,
        "time": made.time,
        "would_help": made.would_help,
    }
    title = f"each device, {'one row' if rows == 'auto' else f'{rows} rows'} of a pass"
    parts = [(part, f"{gib(need[part]):.3f}") for part in _PARTS if need[part]]
    show(
        output,
        data,
        Facts(_heading(made)),
        Table(("part", "GiB"), [*parts, ("in all", f"{gib(total):.3f}")], right=("GiB",), title=title),
        Table(
            ("GPU", "mode", "tier", "GiB", "rows of a pass", "what"),
            [_row(place) for place in made.places],
            right=("GiB", "rows of a pass"),
        ),
        Table(("would fit with",), [(each,) for each in made.would_help]),
    )


def workload(job: FineTuningJob) -> str:
    """The job as a workload of `aim-profile plan`: a workloads file."""
    training = training_of(job).model_dump(mode="json", exclude_defaults=True)
    entry = {"name": job.metadata.name, "kind": "finetune", "training": training}
    comment = "batchSize is auto: this is what one row of a pass takes.\n"
    asked = job.spec.hyperparameters.batch_size == "auto"
    return dump({"version": 1, "workloads": [entry]}, comment if asked else "")


def counted_rows(job: FineTuningJob) -> int | None:
    """Rows to train on, an epoch: of local files, read as `run` reads them; None where one is elsewhere or not there,
    or where rows are packed, which only their tokens tell. Raises DataError.
    """
    held = job.spec.dataset.validation.source
    files = [source.uri for source in job.spec.dataset.all_sources()] + ([held] if held else [])
    if job.spec.dataset.packing or not all(Path(file).is_file() for file in files):
        return None
    from aim_trainer.data.survey import survey

    return round(sum(one.source.weight * int(one.kept.sum()) for one in survey(job.spec).training))


def _place(job: FineTuningJob, facts: ModelFacts, accelerator: Accelerator, mode: PartitionMode) -> Place:
    rows = batch_that_fits(job, facts, mode.memory_bytes)
    need = needed(job, facts, rows or None).total
    short = max(0, need - budget_bytes(mode.memory_bytes, DEFAULT_UTILIZATION)) if not rows else 0
    return Place(accelerator.name, mode.label, mode.tier, mode.memory_bytes, rows, need, short)


def _smallest_of_each(places: list[Place]) -> list[Place]:
    """Of each GPU the smallest device that holds the job; its largest where none does."""
    chosen: dict[str, Place] = {}
    for place in places:
        known = chosen.get(place.gpu)
        if known is None or _better(place, known):
            chosen[place.gpu] = place
    return list(chosen.values())


def _better(one: Place, other: Place) -> bool:
    if bool(one.rows) != bool(other.rows):
        return bool(one.rows)
    smaller = one.device_bytes < other.device_bytes
    return smaller if one.rows else one.device_bytes > other.device_bytes


def _steps(job: FineTuningJob, rows: int | None, fitting: list[int]) -> Arithmetic | str:
    if rows is None:
        return "unknown: rows are counted of local files that are not packed; give --rows"
    if job.spec.hyperparameters.batch_size != "auto":
        return batches(job, rows)
    if on_cpu(job) or len(set(fitting)) != 1:
        if job.spec.hyperparameters.global_batch_size is None:
            return "unknown: batchSize is auto, and no globalBatchSize is given"
        return batches(job, rows, 1)._replace(micro_batch=0, accumulation=0)
    return batches(job, rows, fitting[0])


def _time(job: FineTuningJob, steps: Arithmetic | str, measured: Path | None) -> str:
    if measured is None:
        return "unknown: nothing is measured; give --measured, a run of the same job"
    if isinstance(steps, str):
        return f"unknown: steps are {steps}"
    seconds = _seconds_a_step(job, RunDirectory(measured))
    return (
        f"{seconds_in_words(seconds * steps.steps)}: {steps.steps} steps of {seconds:.2f} s, the median of {measured}"
    )


def _seconds_a_step(job: FineTuningJob, run: RunDirectory) -> float:
    """The median of a run whose steps cost what this job's do. Raises JobError where they do not."""
    other = read_job(run.job)
    for name, own, theirs in _what_a_step_costs(job, other):
        if own != theirs:
            raise JobError(f"--measured {run.root}: {name} is {theirs} there, {own} here", field="measured")
    seconds = [told.record.seconds for told in read_records(run.metrics) if isinstance(told.record, Step)]
    if len(seconds) <= _WARMING_STEPS:
        raise JobError(f"--measured {run.root}: only {len(seconds)} steps are recorded there", field="measured")
    return median(seconds[_WARMING_STEPS:])


def _what_a_step_costs(one: FineTuningJob, other: FineTuningJob) -> Iterator[tuple[str, Any, Any]]:
    for path in (
        *("base_model.model_id", "method", "quantization", "distributed.workers", "distributed.strategy"),
        *("resources.resource", "resources.gpu", "dataset.packing", "hyperparameters.batch_size"),
        *("hyperparameters.global_batch_size", "hyperparameters.max_seq_length", "hyperparameters.precision"),
        "hyperparameters.gradient_checkpointing",
    ):
        found = []
        for job in (one, other):
            value: Any = job.spec
            for part in path.split("."):
                value = getattr(value, part)
            found.append(value)
        yield path, found[0], found[1]


def _heading(made: Plan) -> list[tuple[str, str]]:
    spec = made.job.spec
    quantized = f" ({spec.quantization or 'nf4'})" if spec.method == "qlora" else ""
    steps = made.steps
    return [
        ("job", made.job.metadata.name),
        ("model", f"{made.facts.id}, {(made.facts.total_params or 0) / 1e9:.2f} billion parameters"),
        ("method", f"{spec.method}{quantized}, {spec.distributed.workers} × {spec.distributed.strategy}"),
        ("rows", "unknown" if made.rows is None else f"{made.rows:,}"),
        ("steps", steps if isinstance(steps, str) else _told(steps)),
        ("time", made.time),
    ]


def _told(steps: Arithmetic) -> str:
    made_of = f" ({steps.micro_batch} × {steps.accumulation} passes a worker)" if steps.micro_batch else ""
    return f"{steps.steps:,} of {steps.global_batch} rows{made_of}, {steps.steps_per_epoch:,} an epoch"


def _row(place: Place) -> tuple[str, ...]:
    what = "fits" if place.rows else f"{gib(place.short_bytes):.1f} GiB short"
    return (place.gpu, place.mode, place.tier, f"{gib(place.device_bytes):.1f}", str(place.rows or ""), what)


def _place_data(place: Place) -> dict[str, Any]:
    return {
        "gpu": place.gpu,
        "mode": place.mode,
        "tier": place.tier,
        "device_gib": gib(place.device_bytes),
        "fits": bool(place.rows),
        "batch": place.rows or None,
        "need_gib": gib(place.need_bytes),
        "short_gib": gib(place.short_bytes),
    }
