"""The verbs about profiles: list, select, show, export, validate, schema. Each returns the exit code.

JSON Schemas are taken from the models that read the files, so they cannot disagree.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from os.path import isfile
from pathlib import Path
from typing import Any, NamedTuple

from aim_profile.errors import AimProfileError, NodeError, PartitionError
from aim_profile.files.read import check as check_options
from aim_profile.gpus.catalog import Accelerator, Deployment, PartitionMode, by_name
from aim_profile.models.facts import ModelFacts, Precision
from aim_profile.models.load import by_id, known_ids, load_model
from aim_profile.nodes.devices import mode_of
from aim_profile.nodes.read import Node
from aim_profile.plans.fleet import FleetFile
from aim_profile.plans.plan import Plan
from aim_profile.plans.workload import Workloads
from aim_profile.serving.check import Finding, check
from aim_profile.serving.derive import NoSuchProfileError, Refusal, Wanted, derive, derive_from_id
from aim_profile.serving.evidence import NO_GPU
from aim_profile.serving.evidence_files import EvidenceFile, read_evidence
from aim_profile.serving.files import Form, Unified, body_of, form_of, read_file, write
from aim_profile.serving.profile import (
    Metric,
    Profile,
    ProfileId,
    parse_reference,
    reference_in,
    to_model_precision,
)
from aim_profile.serving.selection import Devices, Judged, Selection, Wish, select, stored_profiles
from aim_profile.units import parse_memory

from .device import card_of
from .measured import measured_blocks
from .options import refuse_beside
from .output import DOES_NOT_FIT, FITS, Facts, Output, Table, print_note, show, write_out

LISTED_PRECISIONS: tuple[Precision, ...] = ("bf16", "fp8", "int4")


# Fields of Wanted whose option is spelled otherwise.
_OPTIONS = {
    "memory_limit_bytes": "memory-limit",
    "qos_priority": "priority",
    "finetuning": "lora-slots",
    "tensor_parallel": "tensor-parallel",
    "kv_dtype": "kv-dtype",
    "alloc_mode": "alloc-mode",
}


class Row(NamedTuple):
    """One line of `list`: a model in a precision on the smallest device that holds it, or why there is none."""

    model: ModelFacts
    precision: Precision
    mode: PartitionMode | None
    found: Profile | Refusal


def listed(
    accelerator: Accelerator,
    deployment: Deployment,
    models: Sequence[str],
    precisions: Sequence[Precision],
    everything: bool,
) -> Iterator[Row]:
    """Every sized model × precision on the smallest validated device of that GPU; everything: on each mode."""
    modes = accelerator.modes(deployment)
    if not modes:
        raise PartitionError(
            f"nothing is established for {accelerator.name} on {deployment}",
            field="deployment",
            value=deployment,
            remedy=f"see `aim-profile gpus {accelerator.name} --deployment {deployment}`",
        )
    by_size = sorted(modes, key=lambda mode: (mode.tier != "validated", mode.memory_mib, mode.memory))
    for model in map(by_id, models):
        if model.sizable:
            for precision in precisions:
                rows = [
                    Row(model, precision, mode, derive(model, mode, Wanted(precision=precision))) for mode in by_size
                ]
                fitting = [row for row in rows if isinstance(row.found, Profile)]
                # One device goes before several partitions together, which are unproven.
                alone = [row for row in fitting if isinstance(row.found, Profile) and not row.found.unproven]
                yield from rows if everything else (alone or fitting or rows)[:1]


def list_profiles(
    output: Output,
    *,
    gpu: str,
    deployment: Deployment,
    model: str | None,
    precision: Precision | None,
    everything: bool,
    evidence: Path | None = None,
) -> int:
    """One row per derivable profile; what is not sized or does not fit is said on stderr."""
    known = read_evidence(evidence) if evidence else None
    names = [by_id(model).id] if model else list(known_ids())
    rows = list(listed(by_name(gpu), deployment, names, (precision,) if precision else LISTED_PRECISIONS, everything))
    kept = [row.found for row in rows if isinstance(row.found, Profile)]
    kept = known.on_all(kept) if known else kept
    columns = ("profile", "precision", "device", "tier", "tp", "context", "sequences", "weights", "type")
    table = Table(columns, [_list_row(profile) for profile in kept], right=("tp", "context", "sequences"))
    show(output, [_list_data(profile) for profile in kept], table)
    for row in rows:
        if isinstance(row.found, Refusal) and not everything:
            print_note(f"not on {by_name(gpu).name}: {row.model.id} {row.precision}: {row.found.reason}")
    for name in names:
        if not by_id(name).sizable:
            print_note(f"{by_id(name).status}: {name}")
    return FITS if kept else DOES_NOT_FIT


def _list_data(profile: Profile) -> dict[str, Any]:
    use, args = profile.partition, profile.engine_args
    return {
        "profile": profile.reference,
        "model": profile.aim_id,
        "precision": profile.metadata.precision,
        "gpu": profile.metadata.gpu,
        "partition": use.label if use else None,
        "tier": use.tier if use else None,
        "unproven": profile.unproven,
        "tensor_parallel": profile.metadata.gpu_count,
        "max_model_len": args["max-model-len"],
        "max_num_seqs": args["max-num-seqs"],
        "weights": profile.evidence.weights,
        "type": profile.metadata.type,
        "measured": profile.evidence.measured,
    }


def _list_row(profile: Profile) -> tuple[str, ...]:
    data = _list_data(profile)
    device = f"{data['gpu']} {data['partition'] or ''}".strip()
    return (
        data["profile"],
        data["precision"],
        device,
        profile.standing or "-",
        *(str(data[key]) for key in ("tensor_parallel", "max_model_len", "max_num_seqs")),
        data["weights"],
        data["type"],
    )


def devices_of(node: Node, card: int | None) -> Devices:
    """The devices of a node: those of one card, or all whole cards of one kind. Raises NodeError if not known."""
    chosen = card_of(node, card)
    if chosen.is_cpu:
        raise NodeError(
            "no AMD GPU here, and profiles are for GPUs",
            field="node",
            value=chosen.product,
            remedy="give --gpu, --root or --node; `aim-profile fit` sizes a model on these CPUs",
        )
    mode = mode_of(chosen, "bare-metal" if node.deployment == "unknown" else node.deployment)
    alike = [other for other in node.cards if other.product == chosen.product and other.mode_label == chosen.mode_label]
    whole = mode.partitions == 1 and card is None
    return Devices(mode, len(alike) if whole else len(chosen.partitions), chosen.alloc_mode or "CAPPING")


def named_devices(gpu: str, partition: str | None, count: int, deployment: Deployment, alloc_mode: Any) -> Devices:
    """The devices that --gpu, --partition and --count name. Raises GpuError or PartitionError."""
    return Devices(_possible_mode(gpu, partition or "SPX", deployment), count, alloc_mode)


def _possible_mode(gpu: str, partition: str, deployment: Deployment) -> PartitionMode:
    """That mode. Raises GpuError, PartitionError, and NoSuchProfileError for one that no driver switches to."""
    mode = by_name(gpu).mode(partition, deployment)
    if mode.tier == "unsupported":
        raise NoSuchProfileError(
            f"{mode.accelerator} {mode.label} is unsupported on {deployment}",
            field="partition",
            value=mode.label,
            remedy=f"`aim-profile gpus {mode.accelerator} --deployment {deployment}` names its modes",
        )
    return mode


def select_profile(
    output: Output, model_id: str, devices: Devices, wish: Wish, folder: Path | None, evidence: Path | None = None
) -> int:
    """The profile chosen for the devices, and every other with the reason it lost."""
    known = read_evidence(evidence) if evidence else None
    model = load_model(model_id)
    stored = stored_profiles(folder, model.id) if folder else ()
    found = select(model, devices, wish, stored, known.measurements if known else ())
    if known and found.chosen:
        known.on(found.chosen)  # a file that was named must be of what was chosen
    show(output, _selection_data(found, devices), _selection_facts(found, devices), _judged(found.judged))
    return FITS if found.chosen else DOES_NOT_FIT


def _selection_data(found: Selection, devices: Devices) -> dict[str, Any]:
    return {
        "devices": devices.label,
        "chosen": found.chosen.reference if found.chosen else None,
        "measured": found.chosen.evidence.measured if found.chosen else None,
        "relaxed": list(found.relaxed),
        "candidates": [judged._asdict() for judged in found.judged],
    }


def _selection_facts(found: Selection, devices: Devices) -> Facts:
    mode = devices.mode
    return Facts(
        (
            ("devices", f"{devices.label}, {mode.memory_mib} MiB and {mode.cus} CUs each"),
            ("chosen", found.chosen.reference if found.chosen else "nothing matches"),
            ("standing", (found.chosen.standing or "") if found.chosen and found.chosen.evidence.measured else ""),
            ("let go", ", ".join(found.relaxed)),
        )
    )


def _judged(judged: Sequence[Judged]) -> Table:
    rows = [(item.verdict, item.path or item.reference, item.origin, item.reason) for item in judged]
    return Table(("verdict", "profile", "from", "why"), rows)


def wanted(
    *,
    metric: Metric | None = None,
    memory_limit: str | None = None,
    lora_slots: int = 0,
    lora_rank: int = 16,
    **options: Any,
) -> Wanted:
    """What the options ask for. Raises AimProfileError for numbers out of range, or a memory limit without a unit."""
    # Left out is not the same as `latency`: a reference may say throughput.
    said: dict[str, Any] = {} if metric is None else {"metric": metric}
    if lora_slots:
        said["finetuning"] = {"lora_slots": lora_slots, "lora_rank": lora_rank}
    limit = None if memory_limit is None else parse_memory(memory_limit, field="memory-limit")
    return check_options(Wanted, {**options, **said, "memory_limit_bytes": limit}, "options", AimProfileError)


def find_profile(
    reference: str, asked: Wanted, partition: str | None, gpu: str | None, deployment: Deployment
) -> Profile:
    """A profile file, a reference (`org/model/id`), or a model on --gpu and --partition.

    Raises AimProfileError where there is none, and for options that a file or a reference already decides.
    """
    file = Path(reference)
    device = {"gpu": gpu, "partition": partition}
    if isfile(file) and file.suffix in (".yaml", ".yml", ".json"):
        said = {*asked.model_dump(exclude_defaults=True), *asked.model_fields_set & {"metric"}}
        changed = {name: getattr(asked, name) for name in sorted(said)}
        refuse_beside(reference, device | {_OPTIONS.get(name, name): value for name, value in changed.items()})
        return read_file(file)
    named = reference_in(reference)
    if named is not None or gpu is None:
        model_id, parts = named or parse_reference(reference)
        refuse_beside(reference.rpartition("/")[2], device | _contradicting(asked, parts))
        _possible_mode(parts.gpu, parts.partition or "SPX/NPS1", deployment)
        return derive_from_id(model_id, parts, asked, deployment)
    model = load_model(reference)
    mode = _possible_mode(gpu, partition or "SPX", deployment)
    found = derive(model, mode, asked)
    if isinstance(found, Refusal):
        raise NoSuchProfileError(
            f"{model.id}: {found.reason}", field="profile", remedy="`aim-profile fit` names what would fit"
        )
    return found


def with_evidence(profile: Profile, path: Path | None) -> Profile:
    """The profile with the evidence there; what is of something else is said on stderr.

    Raises ProfileError: a file that was named is of something else, or nothing there is evidence.
    """
    if path is None:
        return profile
    known = read_evidence(path)
    found = known.on(profile)
    if note := known.passed_over(found):
        print_note(note)
    return found


def _contradicting(asked: Wanted, parts: ProfileId) -> dict[str, object]:
    """The options that ask for something else than the id says."""
    says = {
        "precision": to_model_precision(parts.precision),
        "metric": parts.metric,
        "tensor_parallel": parts.gpu_count,
    }
    asks = {name: getattr(asked, name) for name in says if name in asked.model_fields_set}
    return {_OPTIONS.get(name, name): value for name, value in asks.items() if value != says[name]}


def show_profile(output: Output, profile: Profile) -> int:
    """Everything a profile says."""
    metadata, use, evidence = profile.metadata, profile.partition, profile.evidence
    unproven = ", tensor parallelism over partitions unproven" if profile.unproven else ""
    head = Facts(
        (
            ("profile", profile.reference),
            ("model loaded", profile.model_id or "any"),
            ("engine", metadata.engine),
            ("devices", _devices(profile)),
            ("each", f"{use.device_memory_mib} MiB, {use.compute_units} CUs, {use.alloc_mode}" if use else ""),
            ("tier", f"{use.tier} on {use.deployment}{unproven}" if use and use.tier else ""),
            ("type", f"{metadata.type}, {'measured' if evidence.measured else 'not measured'}"),
            ("weights", evidence.weights),
            ("priority", profile.gpu_sharing.qos_priority),
            ("manual only", "yes" if metadata.manual_selection_only else ""),
        )
    )
    arguments = Facts([(key, _scalar(value)) for key, value in profile.engine_args.items()], title="Engine arguments")
    variables = Facts(list(profile.env_vars.items()), title="Environment")
    notes = "\n".join(f"- {note}" for note in evidence.notes)
    show(output, body_of(profile), head, _memory(profile), *measured_blocks(profile), arguments, variables, notes)
    return FITS


def _devices(profile: Profile) -> str:
    kept, use = profile.metadata, profile.partition
    return "processors" if kept.gpu == NO_GPU else f"{kept.gpu_count} x {kept.gpu}{f' {use.label}' if use else ''}"


def _memory(profile: Profile) -> Facts:
    evidence = profile.evidence
    parts = (
        ("weights", evidence.weights_gib),
        ("overhead", evidence.overhead_gib),
        ("KV cache", evidence.kv_gib),
        ("budget", evidence.budget_gib),
    )
    return Facts([(label, f"{size} GiB") for label, size in parts if size is not None], title="Memory of each device")


def _scalar(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def export_profile(profile: Profile, form: Form, file: Path | None, folder: Path | None) -> int:
    """The profile in one of its forms: on stdout, in a file, or in a folder laid out as AIM's."""
    text = write(profile, form, _facts_of(profile))
    if folder is not None:
        file = folder / (profile.aim_id or "general") / f"{profile.id}.{'json' if form == 'unified' else 'yaml'}"
    write_out(text, file, make_folder=folder is not None)
    return FITS


def _facts_of(profile: Profile) -> ModelFacts | None:
    try:
        return by_id(profile.aim_id or "")
    except AimProfileError:
        return None


def validate(output: Output, files: Sequence[Path]) -> int:
    """Each file's form, id and findings. Exit 1 where one contradicts the facts; a malformed file is bad input."""
    results = [_validate_file(file) for file in files]
    rows = [
        (result["file"], result["form"], result["profile"], finding["level"], finding["field"], finding["problem"])
        for result in results
        for finding in result["findings"] or [{"level": "ok", "field": "", "problem": "agrees with the facts"}]
    ]
    show(output, results, Table(("file", "form", "profile", "level", "field", "finding"), rows))
    wrong = any(finding["level"] == "error" for result in results for finding in result["findings"])
    return DOES_NOT_FIT if wrong else FITS


def _validate_file(file: Path) -> dict[str, Any]:
    profile = read_file(file)
    findings: list[Finding] = check(profile)
    return {
        "file": str(file),
        "form": form_of(file.read_text(encoding="utf-8")),
        "profile": profile.reference,
        "findings": [finding._asdict() for finding in findings],
    }


def schema(kind: str) -> int:
    """The JSON Schema of a file of ours, on stdout."""
    write_out(json.dumps(schema_of(kind), indent=2) + "\n", None)
    return FITS


_DRAFT = "https://json-schema.org/draft/2020-12/schema"


def kinds() -> tuple[str, ...]:
    """What has a schema."""
    return tuple(_models())


def schema_of(kind: str) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of that kind of file; unknown keys are refused in it too."""
    title = f"aim-profile {kind}"
    return {"$schema": _DRAFT, **_models()[kind].model_json_schema(), "title": title}


def _models() -> dict[str, Any]:
    plans = {"fleet": FleetFile, "workloads": Workloads, "plan": Plan}
    return {"profile": Profile, "unified": Unified, **plans, "evidence": EvidenceFile}
