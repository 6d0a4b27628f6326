"""From a models file and what was assigned to each of its models: entries for the directory, and who may be loaded.

Several models run each in a process of its own: each may need other devices, another environment, another interpreter.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping, Sequence

from aim_kserve.errors import BadRequest, NotFound, StartupError
from aim_profile.units import MIB
from aim_runtime.assignment import Assignment
from aim_runtime.assignment import Device as AssignedDevice
from aim_runtime.choose import spec_of
from aim_runtime.engine_gauges import Device
from aim_runtime.engines.base import Engine, Prove
from aim_runtime.models.entry import Launch, ModelEntry
from aim_runtime.models.eviction import DoesNotFit
from aim_runtime.models.file import ListedModel, ModelsFile
from aim_runtime.models.loader import Admit
from aim_runtime.settings import RuntimeSettings
from aim_runtime.start import prepare
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
            entry = ModelEntry(model.name, launches, model.aliases, model.priority, at_start, settings.latency_slo_ms)
            entries.append(entry)
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


class Destinations:
    """Where else a model of the file can be served: its next replica, on a card and partition that are asked for."""

    def __init__(
        self,
        listed: ModelsFile,
        own: Sequence[RuntimeSettings],
        assignments: Sequence[Assignment],
        prove: Proof,
    ) -> None:
        self._listed = {model.name: (model, settings) for model, settings in zip(listed.served, own, strict=True)}
        self._first = {each.model: each for each in reversed(assignments)}
        self._prove = prove

    def at(self, name: str, card: int, partition: int) -> Launch:
        """How ``name`` is started there, sized as where it is now: the same context and concurrency. Reads the node
        and the model's files: call it in a thread.

        Raises:
            NotFound: no such model.
            BadRequest: there is no such device here, or the model does not fit it: by how much.
        """
        if name not in self._listed or name not in self._first:
            raise NotFound(f"model {name!r} does not exist; this server knows: {', '.join(self._listed)}")
        model, settings = self._listed[name]
        now = self._first[name]
        spec = spec_of(settings, now)
        on_processors = now.cpus is not None
        if on_processors and card not in {device.card for device in now.devices}:
            raise BadRequest(f"card: model {name} runs on CPU sets, which are partitions of card {now.devices[0].card}")
        wanted = {
            "card": None if on_processors else card,
            "partition_id": partition,
            "partition_count": max(1, len(now.devices)),
            "max_model_len": spec.max_model_len,
            "max_concurrency": spec.max_concurrency,
        }
        try:
            assignment = prepare(settings.model_copy(update=wanted))
        except StartupError as error:
            raise BadRequest(f"model {name}: card {card} partition {partition}: {error}") from error
        return _launch(model, settings, assignment, self._prove)


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


def where_free(
    assignments: Sequence[Assignment], loaded: Callable[[], Mapping[str, Collection[Device]]], *, planned: bool
) -> Admit:
    """Admits a model where no other that is loaded stands on one of its devices. Those that a plan puts on one device
    have been sized together, and may share it.

    loaded: served name → the devices it stands on now, for every model that takes memory.
    """
    memory = {_at(device): device.memory_mib for each in assignments for device in each.devices}
    given: dict[str, set[tuple[str, str]]] = {}
    for each in assignments if planned else ():
        given.setdefault(each.model, set()).update(map(_at, each.devices))

    def admit(entry: ModelEntry, *, without: Collection[str] = ()) -> None:
        wanted = {_at(device) for launch in entry.launches for device in launch.devices}
        own = given.get(entry.name, set())
        for name, devices in loaded().items():
            taken = sorted((wanted & set(map(_at, devices))) - (own & given.get(name, set())))
            if taken and name != entry.name and name not in without:
                raise DoesNotFit(_shortfall(taken, name, memory))

    return admit


def _at(device: Device | AssignedDevice) -> tuple[str, str]:
    return str(device.card), str(device.partition)


def _shortfall(taken: list[tuple[str, str]], owner: str, memory: Mapping[tuple[str, str], int | None]) -> str:
    places = ", ".join(f"card {card} partition {partition}" for card, partition in taken)
    sizes = [memory.get(at) for at in taken]
    known = [size for size in sizes if size is not None]
    gib = f"{sum(known) * MIB / 2**30:.1f} GiB short, " if len(known) == len(sizes) else ""
    return f"{gib}model {owner} has {places}: unload it first"
