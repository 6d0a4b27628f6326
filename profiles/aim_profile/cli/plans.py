"""The verbs about plans: plan, render. Each returns the exit code; diff, assert and steps are in steps.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache, partial
from os.path import isdir, isfile
from pathlib import Path
from typing import Any

from aim_profile.errors import AimProfileError
from aim_profile.files.kinds import looks_like
from aim_profile.files.read import read_parsed
from aim_profile.files.write import dump, dump_all
from aim_profile.gpus.catalog import Deployment
from aim_profile.kubernetes.compose import COMMENT, project_of
from aim_profile.kubernetes.kserve import Document, Service, render_services, service_name
from aim_profile.kubernetes.kueue import cluster_queue_of
from aim_profile.kubernetes.plan_objects import config_map_of, partition_plan_of, services_of
from aim_profile.kubernetes.target import Target
from aim_profile.nodes.read import read_node
from aim_profile.plans.day import DayPlan, has_windows, plan_day
from aim_profile.plans.fleet import Fleet, fleet_of, load_fleet
from aim_profile.plans.make import make_plan
from aim_profile.plans.plan import (
    CardPlan,
    Placement,
    Plan,
    PlanError,
    PlanOptions,
    Unplaced,
    dump_plan,
    load_plan,
    plan_of,
)
from aim_profile.plans.replan import Replanned, replan
from aim_profile.plans.workload import WorkloadError, Workloads, load_workloads, with_line, workloads_from
from aim_profile.serving.derive import Wanted
from aim_profile.serving.evidence import Subject
from aim_profile.serving.evidence_files import Evidence, read_evidence
from aim_profile.serving.files import profile_of

from .day import show_day
from .device import find_node
from .options import refuse_beside
from .output import DOES_NOT_FIT, FITS, Block, Facts, Output, Table, print_note, print_text, show, write_out
from .picture import draw, summary
from .profiles import find_profile

_LIVE = "live"
_MOST_NAMES = 8


def plan(
    output: Output,
    fleet: str,
    workloads: Path,
    options: PlanOptions,
    *,
    current: Path | None,
    previous: Path | None,
    svg: Path | None,
    out: Path | None,
    strict: bool = False,
    evidence: Path | None = None,
    at: str | None = None,
) -> int:
    """Plan, print, draw. Exit 1 where a replica has no device. at: the time of day whose plan is wanted alone."""
    known = read_evidence(evidence) if evidence else None
    _refuse_stdout(svg, out)
    files = {"current": current, "previous": previous, "exact": options.exact or None}
    file = read_parsed(workloads, WorkloadError)
    there, asked = _fleet(fleet, strict), workloads_from(file)
    try:
        found = _planned(there, asked, options, files, known, at)
    except WorkloadError as problem:
        raise with_line(problem, file) from problem
    if isinstance(found, DayPlan):
        return show_day(output, found, partial(_blocks, known=known), svg=svg, out=out)
    made, changes = found
    measured = _measured(made, known) if known else ""  # what it refuses is refused before a file is written
    written = cache(partial(dump_plan, made))
    if svg is not None:
        write_out(draw(made), svg)
    if out is not None:
        write_out(written("json" if out.suffix == ".json" else "yaml"), out)
    # The files that other verbs read are the machine output, word for word.
    if output == "table":
        first, *more = _blocks(made, known)
        show(output, None, first, *((_since(changes), _moves(changes)) if changes else ()), *more)
    else:
        print_text(written(output))
        if measured:
            print_note(f"measured: {measured}")
        if changes:
            print_note("\n".join(f"{name}: {text}" for name, text in _since(changes).facts if text))
    return FITS if made.complete else DOES_NOT_FIT


def _refuse_stdout(svg: Path | None, out: Path | None) -> None:
    for option, file in (("svg", svg), ("out", out)):
        if str(file) == "-":
            refuse_beside("the table on stdout (-o yaml and -o json print the plan there)", {option: file})


def _blocks(made: Plan, known: Evidence | None) -> Sequence[Block]:
    """One plan for people."""
    return (
        _facts(made, _measured(made, known) if known else ""),
        _derived(made),
        _evidence(made),
        _cards(made),
        _placements(made),
        _unplaced(made.unplaced),
    )


def _planned(
    fleet: Fleet,
    workloads: Workloads,
    options: PlanOptions,
    given: Mapping[str, Any],
    known: Evidence | None,
    at: str | None,
) -> DayPlan | tuple[Plan, Replanned | None]:
    """A day of plans, or one plan with what it changes of the one before. given: current, previous, exact."""
    measurements = known.measurements if known else ()
    if has_windows(workloads):
        refuse_beside("a day of windows, each planned from the one before it,", given)
        day = plan_day(fleet, workloads, options, measurements)
        return day if at is None else (day.at(at).plan, None)
    refuse_beside("a workloads file without windows", {"at": at})
    if given["previous"] is not None:
        refuse_beside("--previous", {"current": given["current"], "exact": given["exact"]})
        changes = replan(fleet, workloads, load_plan(given["previous"]), options, measurements)
        return changes.plan, changes
    before = load_plan(given["current"]) if given["current"] is not None else ()
    return make_plan(fleet, workloads, options, before, measurements), None


def _since(changes: Replanned) -> Facts:
    """What is different from the plan before, and why nothing else is."""
    return Facts(
        (
            ("stay", f"{changes.stays} replicas where they are"),
            ("start", _some(changes.started)),
            ("stop", _some(changes.stopped)),
            ("move", _some(list(changes.moved))),
            ("start anew", _some([f"{name} ({what})" for name, what in changes.changed.items()])),
            ("why", changes.why),
        )
    )


def _moves(changes: Replanned) -> Table | str:
    rows = list(changes.moved.items())
    return Table(("replica", "from, to and why"), rows, title="Moved") if rows else ""


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def _fleet(named: str, strict: bool) -> Fleet:
    """A fleet file, an emulation file, a recorded tree, or this machine (`live`)."""
    if named == _LIVE:
        return fleet_of([read_node()])
    place = Path(named)
    if not isdir(place):
        return load_fleet(place, strict=strict)
    recorded = read_node(place)
    return fleet_of([recorded.model_copy(update={"name": recorded.name or place.resolve().name.lower()})])


def _measured(made: Plan, known: Evidence) -> str:
    """The replicas whose model, precision, GPU, mode and devices somebody measured. Raises ProfileError where a file
    that was named speaks for none of them."""
    gpus = {(card.node, card.card): card.gpu for card in made.cards}
    subjects = {each.id: _subject(each, gpus) for each in made.placements if each.kind == "serve"}
    found = [name for name, subject in subjects.items() if known.speaks_for(subject)]
    if known.is_file and subjects and not found:
        raise known.of_something_else(next(iter(subjects.values())), next(iter(subjects)))
    return f"{len(found)} of {len(subjects)} replicas: {', '.join(found) or 'none'}"


def _subject(placement: Placement, gpus: Mapping[tuple[str, int], str]) -> Subject:
    return Subject(
        model=placement.model,
        engine="vllm",
        precision="fp4" if placement.precision == "mxfp4" else placement.precision or "",
        gpu=gpus[placement.node, placement.cards[0]],
        partition=placement.mode,
        alloc_mode="CAPPING",
        gpu_count=placement.tp,
    )


def _facts(made: Plan, measured: str = "") -> Facts:
    by_priority = ", ".join(f"{made.totals.placed[p]} of {made.totals.asked[p]} {p}" for p in made.totals.asked)
    return Facts(
        (
            ("plan", summary(made)),
            ("placed", by_priority),
            ("measured", measured),
            ("method", f"{made.totals.method}, tier {made.tier}"),
            ("notes", "; ".join(made.notes)),
        )
    )


def _derived(made: Plan) -> Table:
    """How replicas follow from loads, and by which evidence."""
    rows = [
        (
            each.workload,
            f"{each.requests_per_s:g}",
            str(each.replicas),
            f"{each.requests_per_s_each:.3g}",
            str(each.concurrency),
            f"{each.tp} x {each.device}" if each.tp > 1 else each.device,
            each.reason,
        )
        for each in made.derived
    ]
    columns = ("workload", "requests/s", "replicas", "each", "sequences", "by what is served on", "why")
    return Table(columns, rows, right=columns[1:5], title="Replicas from loads")


def _evidence(made: Plan) -> str:
    labels = dict.fromkeys(label for each in made.derived for label in each.evidence)
    return "\n".join(f"- evidence: {label}" for label in labels)


def _cards(made: Plan) -> Table:
    used = {(p.node, card, part) for p in made.placements for card, part in p.devices}
    taken = Counter((node, card) for node, card, _ in used)
    columns = ("node", "card", "GPU", "mode", "was", "tier", "devices", "used", "MiB each")
    rows = [_card_row(card, taken[card.node, card.card]) for card in made.cards]
    return Table(columns, rows, right=("card", "devices", "used", "MiB each"), title="Cards")


def _card_row(card: CardPlan, taken: int) -> tuple[str, ...]:
    was = "same" if card.was == card.mode else card.was or "unknown"
    figures = (str(card.partitions), str(taken), str(card.device_memory_mib))
    return (card.node, str(card.card), card.gpu, card.mode or "unknown", was, card.tier, *figures)


def _placements(made: Plan) -> Table:
    columns = ("replica", "priority", "model", "node", "card", "devices", "mode", "need", "budget", "spare", "why here")
    rows = [
        (
            placement.id,
            placement.priority,
            placement.model or placement.kind,
            placement.node,
            _numbers(placement.cards),
            _numbers(placement.partitions),
            placement.mode,
            f"{placement.need_gib:.1f}",
            f"{placement.budget_gib:.1f}",
            f"{placement.headroom_gib:.1f}",
            placement.reason,
        )
        for placement in made.placements
    ]
    return Table(columns, rows, right=("need", "budget", "spare"), title="Replicas (GiB on each device)")


def _numbers(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))


def _unplaced(unplaced: Sequence[Unplaced]) -> Table | str:
    if not unplaced:
        return ""
    rows = [
        (
            item.workload,
            str(len(item.replicas)),
            item.priority,
            item.cause,
            "-" if item.shortfall_gib is None else f"{item.shortfall_gib:g}",
            item.reason,
            "; ".join(item.remedies) or "-",
        )
        for item in unplaced
    ]
    columns = ("workload", "replicas", "priority", "cause", "short GiB", "why", "what would help")
    return Table(columns, rows, right=("replicas", "short GiB"), title="Without a device")


def render(
    source: str,
    target: Target,
    *,
    workloads: Path | None,
    storage_uris: Mapping[str, str],
    name: str | None,
    replicas: int | None,
    gpu: str | None,
    partition: str | None,
    deployment: Deployment,
    refused: Mapping[str, object],
    out: Path | None,
) -> int:
    """A plan file, a profile file or a profile's reference as Kubernetes objects. refused: options of other forms."""
    refuse_beside("a rendering without --compose", refused)
    file = read_parsed(Path(source), PlanError) if isfile(source) else None
    if file is not None and looks_like(file.raw) == "plan":
        refuse_beside("a plan", {"name": name, "replicas": replicas, "gpu": gpu, "partition": partition})
        documents = _render_plan(plan_of(file), target, workloads, storage_uris)
    else:
        refuse_beside("a profile", {"workloads": workloads, **_of_a_plan(target)})
        if file is not None:
            refuse_beside(source, {"gpu": gpu, "partition": partition})
        profile = profile_of(file) if file is not None else find_profile(source, Wanted(), partition, gpu, deployment)
        named = name or service_name(profile.aim_id or profile.id)
        uri = _addresses(storage_uris, [named]).get(named)
        documents = render_services([Service(named, profile, replicas or 1, storage_uri=uri)], target)
    write_out(dump_all(documents), out)
    return FITS


def _of_a_plan(target: Target) -> Mapping[str, object]:
    return {"cluster-queue": target.cluster_queue, "partition-plan": target.partition_plan}


def render_compose(
    plan: Path,
    at: tuple[Path | None, Path | None, str | None],
    *,
    image: str | None,
    workloads: Path | None,
    storage_uris: Mapping[str, str],
    refused: Mapping[str, object],
    out: Path | None,
) -> int:
    """A plan's replicas on the node `at` (root, emulation file, name in the plan) as a Compose project."""
    refuse_beside("--compose", refused)
    root, file, name = at
    made = load_plan(plan)
    uris = _addresses(storage_uris, list(dict.fromkeys(run.workload for run in made.placements)))
    known = load_workloads(workloads) if workloads else None
    found = project_of(made, find_node(root, (), file), name, known, uris, image)
    for line in found.skipped:
        print_note(f"not rendered: {line}")
    write_out(dump(found.document, COMMENT), out)
    return FITS


def _render_plan(made: Plan, target: Target, workloads: Path | None, storage_uris: Mapping[str, str]) -> list[Document]:
    served = dict.fromkeys(run.workload for run in made.placements if run.kind == "serve")
    uris = _addresses(storage_uris, list(served))
    found = services_of(made, load_workloads(workloads) if workloads else None, uris)
    for line in found.skipped:
        print_note(f"not rendered: {line}")
    # Where the driver partitions, nothing else may.
    if target.partition_plan:
        modes = partition_plan_of(made, target.partition_plan, target)
    else:
        modes = [] if target.auto_partition else config_map_of(made, target)
    queue = cluster_queue_of(made, target.cluster_queue, target) if target.cluster_queue else []
    return [*modes, *queue, *render_services(found.services, target)]


def _addresses(given: Mapping[str, str], services: Sequence[str]) -> Mapping[str, str]:
    """URIs by service; a bare one is the only service's. Raises AimProfileError for a name that no service has."""
    bare = given.get("")
    if bare is not None and len(services) != 1:
        raise AimProfileError(
            f"storage-uri: {bare}: of which of {len(services)} services",
            field="storage-uri",
            value=bare,
            remedy=f"write NAME={bare}",
        )
    if unknown := next((name for name in given if name and name not in services), None):
        raise AimProfileError(
            f"storage-uri: no service is named {unknown!r}",
            field="storage-uri",
            value=unknown,
            remedy=f"they are {', '.join(services)}",
        )
    return {services[0]: bare} | dict(given) if bare is not None else given


def storage_uris(given: Sequence[str]) -> dict[str, str]:
    """`NAME=URI` pairs; a bare URI is for the only service there is. Raises AimProfileError."""
    found: dict[str, str] = {}
    for text in given:
        name, equals, uri = text.partition("=")
        if "://" in name or not equals:
            name, uri = "", text
        if "://" not in uri:
            raise AimProfileError(
                f"storage-uri: {text!r} is no address",
                field="storage-uri",
                value=text,
                remedy="write NAME=URI, as in chat=pvc://models/llama, or a URI alone for a profile",
            )
        found[name] = uri
    return found
