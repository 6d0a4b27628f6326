"""serving-profile.yaml: how the result is served, on which device it fits, and what it was made from.

Derived by aim_profile from the base model's own dimensions. What is not known says so; nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from aim_profile.errors import AimProfileError
from aim_profile.gpus.catalog import PartitionMode, by_name
from aim_profile.models.facts import ModelFacts
from aim_profile.models.load import load_model
from aim_profile.serving.derive import Refusal, Wanted, derive
from aim_profile.serving.evidence import NO_GPU
from aim_profile.serving.files import as_ours
from aim_profile.serving.profile import (
    NOT_MEASURED,
    PRECISIONS,
    AimPrecision,
    Evidence,
    FineTuning,
    Metadata,
    Metric,
    Profile,
    ProfileId,
    parse_id,
)
from aim_profile.serving.profile import Provenance as Served

from .provenance import Provenance

FILE = "serving-profile.yaml"
#: Where the job names no profile: partitions of the card most of ours have.
_USUAL_GPU = "MI300X"
#: Room over the longest usual training row: a conversation goes on after the last turn that was trained on.
_HEADROOM = 1.25
_STEP, _LEAST = 256, 512


@dataclass(frozen=True, slots=True)
class Length:
    """max-model-len, and why it is so."""

    tokens: int
    why: str


def context_of(origin: Provenance, limit: int | None) -> Length:
    """From the rows it was trained on: 1.25 × their 99.9th percentile, in whole 256s, at least 512, and never more than
    the model was made for (limit; None: unknown). Without rows, what aim_profile takes.
    """
    if origin.row_tokens is None:
        tokens, why = 8192, "the run's data is gone: aim_profile's own 8192"
    else:
        most, longest = origin.row_tokens
        tokens = max(_LEAST, -(-int(most * _HEADROOM) // _STEP) * _STEP)
        why = f"99.9 % of the training rows have at most {most} tokens (the longest {longest}): a quarter more, in 256s"
    if limit is not None and limit < tokens:
        return Length(limit, f"{limit} positions are what the model was made for ({why})")
    return Length(tokens, why)


def facts_of(base: Path, name: str) -> ModelFacts | str:
    """What is known of the model in that directory or file, called `name`; or why nothing is."""
    try:
        return load_model(base).model_copy(update={"id": name})
    except AimProfileError as problem:
        return str(problem)


def serving_profile(
    facts: ModelFacts | str, name: str, length: Length, tuned: FineTuning, named: str | None
) -> Profile:
    """facts: of the model `name` that is loaded; named: the profile the job was meant for, by id or reference.

    Raises ProfileError for a `named` that is no profile's id.
    """
    meant = parse_id(named.rpartition("/")[2]) if named else None
    if isinstance(facts, str) or not facts.sizable:
        why = facts if isinstance(facts, str) else facts.status
        return _nowhere(name, None, length, tuned, f"where it fits is unknown: {why}")
    wanted = _wanted(length, tuned, meant)
    refused: list[str] = []
    for mode in _modes(meant):
        try:
            found = derive(facts, mode, wanted)
        except AimProfileError as problem:
            found = Refusal(str(problem))
        if isinstance(found, Profile):
            return _noted(found, _notes(length, mode, meant))
        refused.append(f"{mode.accelerator} {mode.label}: {found.reason}")
    return _nowhere(name, facts, length, tuned, f"it fits nowhere that was looked at: {refused[-1]}")


def as_file(profile: Profile, length: Length) -> str:
    """Its text, with the reason for its length above."""
    return f"# max-model-len: {length.why}.\n{as_ours(profile)}"


def served_from(origin: Provenance) -> Served:
    """As a profile carries it."""
    tuned = {name: value for name, (_, value) in origin.metrics.items() if value is not None}
    return Served(
        base=origin.base,
        revision=origin.revision,
        method=origin.method,
        base_digest=origin.base_digest,
        job_digest=origin.job_digest,
        data_digest=origin.data_digest,
        metrics=tuned,
        tools=dict(origin.tools),
    )


def _wanted(length: Length, tuned: FineTuning, meant: ProfileId | None) -> Wanted:
    metric: Metric = meant.metric if meant else "latency"
    count = meant.gpu_count if meant else None
    return Wanted(context=length.tokens, metric=metric, tensor_parallel=count, finetuning=tuned)


def _modes(meant: ProfileId | None) -> Iterator[PartitionMode]:
    """The one that was meant, else those AMD validates, the smallest device first."""
    if meant is not None:
        yield by_name(meant.gpu).mode(meant.partition or "SPX/NPS1")
        return
    modes = [mode for mode in by_name(_USUAL_GPU).modes("bare-metal") if mode.tier == "validated"]
    yield from sorted(modes, key=lambda mode: (mode.memory_mib, mode.label))


def _notes(length: Length, mode: PartitionMode, meant: ProfileId | None) -> tuple[str, ...]:
    chosen = f"the smallest validated partition of {mode.accelerator} that holds it; the job names no profile"
    return (f"max-model-len: {length.why}", "as the job's baseModel.profile says" if meant else chosen)


def _noted(profile: Profile, notes: tuple[str, ...]) -> Profile:
    evidence = profile.evidence.model_copy(update={"notes": (*profile.evidence.notes, *notes)})
    return profile.model_copy(update={"evidence": evidence})


def _nowhere(name: str, facts: ModelFacts | None, length: Length, tuned: FineTuning, why: str) -> Profile:
    """Everything but the device: gpu NONE."""
    args: dict[str, JsonValue] = {"max-model-len": length.tokens}
    if tuned.lora_slots:
        args |= {"enable-lora": True, "max-loras": tuned.lora_slots, "max-lora-rank": tuned.lora_rank}
    own = facts.native_precision if facts else None
    precision: AimPrecision = next((known for known in PRECISIONS if known == own), "bf16")
    return Profile(
        aim_id=name,
        model_id=name,
        metadata=Metadata(
            engine="vllm",
            gpu=NO_GPU,
            precision=precision,
            gpu_count=0,
            metric="latency",
            type="unoptimized",
            manual_selection_only=True,
        ),
        engine_args=args,
        finetuning=tuned,
        evidence=Evidence(notes=(NOT_MEASURED, f"max-model-len: {length.why}", why)),
    )
