"""From a models file and what was assigned to each of its models: entries for the directory, and who may be loaded.

Several models run each in a process of its own: each may need other devices, another environment, another interpreter.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping, Sequence

from aim_kserve.errors import StartupError
from aim_profile.units import MIB
from aim_runtime.assignment import Assignment
from aim_runtime.choose import spec_of
from aim_runtime.engine_gauges import Device
from aim_runtime.engines.base import Engine
from aim_runtime.model import State
from aim_runtime.models.entry import Launch, ModelEntry
from aim_runtime.models.eviction import DoesNotFit
from aim_runtime.models.file import ListedModel, ModelsFile
from aim_runtime.self_check import Prove
from aim_runtime.settings import RuntimeSettings
from aim_runtime.supervisor.create import remote_engine
from aim_runtime.supervisor.launch import Launch as Process

#: What an engine must show before it gets requests.
Proof = Callable[[RuntimeSettings, Assignment], Prove | None]


def entries_of(
    listed: ModelsFile, own: Sequence[RuntimeSettings], assignments: Sequence[Assignment], prove: Proof
) -> list[ModelEntry]:
    """An entry for each model of the file that has a place here.

    Raises:
        StartupError: none has, or a name's variant has none.
    """
    entries = []
    for model, settings in zip(listed.served, own, strict=True):
        launches = tuple(_launch(model, settings, each, prove) for each in assignments if each.model == model.name)
        if launches:
            at_start = model.load == "at_start"
            entries.append(ModelEntry(model.name, launches, model.aliases, model.priority, at_start))
    placed = {entry.name for entry in entries}
    for split in listed.variants:
        if missing := sorted(split.weights.keys() - placed):
            raise StartupError(
                f"model {split.name}: its variant {missing[0]} has no place here: the plan leaves it out"
            )
    if not entries:
        raise StartupError("the plan places no model of the file here")
    return entries


def _launch(model: ListedModel, settings: RuntimeSettings, assignment: Assignment, prove: Proof) -> Launch:
    spec = spec_of(settings, assignment)
    process = Process(
        spec,
        python=str(model.python or sys.executable),
        env=assignment.env,
        cpus=frozenset(assignment.cpus or ()) or None,
        memory_bytes=assignment.memory_bytes,
    )

    def create() -> Engine:
        return remote_engine(settings, process)

    return Launch(
        create, place_of(assignment), devices_of(assignment), assignment.memory_bytes, prove(settings, assignment)
    )


def place_of(assignment: Assignment) -> str:
    """``card 0 partition 3``, for people; of several devices all of them."""
    if not assignment.devices:
        return f"replica {assignment.replica}"
    return ", ".join(f"card {device.card} partition {device.partition}" for device in assignment.devices)


def devices_of(assignment: Assignment) -> tuple[Device, ...]:
    """What an engine runs on, as metrics label it."""
    mode = (assignment.evidence.mode or "").split("/")
    compute, memory = mode if len(mode) == 2 else ("", "")
    return tuple(Device(str(each.card), str(each.partition), compute, memory) for each in assignment.devices)


def one_at_a_time(assignments: Sequence[Assignment], states: Callable[[], Mapping[str, State]]) -> Callable[..., None]:
    """Admits a model where no other that is loaded has one of its devices. For models that no plan has placed: what a
    plan lets share a device has been sized together.

    states: served name → its state now.
    """
    memory = {(str(d.card), str(d.partition)): d.memory_mib for each in assignments for d in each.devices}
    owners: dict[str, set[tuple[str, str]]] = {}
    for each in assignments:
        owners.setdefault(each.model, set()).update((str(d.card), str(d.partition)) for d in each.devices)

    def admit(entry: ModelEntry, *, without: Collection[str] = ()) -> None:
        wanted = {(device.card, device.partition) for launch in entry.launches for device in launch.devices}
        now = states()
        for name, devices in owners.items():
            loaded = now.get(name) in (State.LOADING, State.READY, State.UNLOADING)
            taken = sorted(wanted & devices)
            if name != entry.name and loaded and name not in without and taken:
                raise DoesNotFit(_shortfall(taken, name, memory))

    return admit


def _shortfall(taken: list[tuple[str, str]], owner: str, memory: Mapping[tuple[str, str], int | None]) -> str:
    places = ", ".join(f"card {card} partition {partition}" for card, partition in taken)
    sizes = [memory[at] for at in taken]
    known = [size for size in sizes if size is not None]
    gib = f"{sum(known) * MIB / 2**30:.1f} GiB short, " if len(known) == len(sizes) else ""
    return f"{gib}model {owner} has {places}: unload it first"
