"""Which of a node's devices a model may have: by card and partition on bare metal, by what is here in a pod."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from aim_profile.errors import AimProfileError
from aim_profile.gpus.catalog import Accelerator, Deployment, PartitionMode, by_name
from aim_profile.nodes.facts import AllocMode, Card, Node
from aim_profile.units import GIB
from aim_runtime.settings import RuntimeSettings

from .facts import Case, Device, Refused


class Kind(NamedTuple):
    """Devices of one product in one mode, in the node's order. mode.memory_mib is of the smallest of them."""

    mode: PartitionMode
    alloc_mode: AllocMode
    devices: tuple[Device, ...]
    notes: tuple[str, ...] = ()

    @property
    def whole_cards(self) -> bool:
        return self.mode.partitions == 1

    @property
    def label(self) -> str:
        return f"{self.mode.accelerator} {self.mode.label}"


def kinds_of(case: Case) -> list[Kind]:
    """The devices that the settings allow, by kind; never empty.

    Raises:
        Refused: none, or in a pod another one than asked for: wrong GPU, wrong mode, a part of a card where a whole one
            is asked for, or a mixture.
    """
    settings, in_pod = case.settings, case.in_pod
    cards = _of_that_model(_known(_that_card(gpus(case.node), settings, in_pod)), settings)
    kinds = _grouped(_in_mode(cards, settings, in_pod), case)
    kinds = [kind for kind in kinds if _shared_as_asked(kind, settings)] or _refuse_sharing(kinds, settings)
    if in_pod and len(kinds) > 1:
        raise Refused(
            f"devices of {len(kinds)} kinds are here: {', '.join(kind.label for kind in kinds)}",
            field="devices",
            value=len(kinds),
            remedy="request one resource, as in amd.com/cpx_nps4",
        )
    return kinds


def gpus(node: Node) -> tuple[Card, ...]:
    """The node's cards that are GPUs, empty where the machine has none."""
    return tuple(card for card in node.cards if not card.is_cpu)


def _that_card(cards: Sequence[Card], settings: RuntimeSettings, in_pod: bool) -> Sequence[Card]:
    if settings.card is None:
        return cards
    if in_pod:
        raise Refused(
            f"card {settings.card}: in a pod the device plugin has chosen the card",
            field="card",
            value=settings.card,
            remedy="leave it out",
        )
    found = [card for card in cards if card.index == settings.card]
    if not found:
        here = ", ".join(str(card.index) for card in cards)
        raise Refused(
            f"no card {settings.card}", field="card", value=settings.card, remedy=f"the cards here are {here}"
        )
    return found


def _known(cards: Sequence[Card]) -> list[tuple[Card, Accelerator]]:
    known = [(card, card.accelerator) for card in cards]
    found = [(card, accelerator) for card, accelerator in known if accelerator is not None]
    if not found:
        unknown = cards[0]
        raise Refused(
            f"card {unknown.index} ({unknown.pci_id or 'no PCI id'}) is not in the catalogue: there is nothing to "
            "size a model by",
            field="gpu",
            value=unknown.pci_id,
            remedy=unknown.report or "see `aim-profile gpus`",
        )
    return found


def _of_that_model(cards: list[tuple[Card, Accelerator]], settings: RuntimeSettings) -> list[tuple[Card, Accelerator]]:
    if settings.gpu_model is None:
        return cards
    try:
        wanted = by_name(settings.gpu_model).name
    except AimProfileError as error:
        raise Refused.because(error) from None
    found = [(card, accelerator) for card, accelerator in cards if accelerator.name == wanted]
    if not found:
        here = ", ".join(dict.fromkeys(accelerator.name for _, accelerator in cards))
        raise Refused(
            f"gpu-model {wanted}: the GPU here is {here}",
            field="gpu-model",
            value=settings.gpu_model,
            remedy="leave it out",
        )
    return found


class _Placed(NamedTuple):
    card: Card
    accelerator: Accelerator
    label: str
    notes: tuple[str, ...]


def _in_mode(cards: list[tuple[Card, Accelerator]], settings: RuntimeSettings, in_pod: bool) -> list[_Placed]:
    placed = [_Placed(card, accelerator, *_mode(card, accelerator, settings)) for card, accelerator in cards]
    wrong = [place for place in placed if _asked_mode(settings, place.label) != place.label]
    if not wrong or (len(wrong) < len(placed) and not in_pod):
        return [place for place in placed if place not in wrong]
    field = "compute-partition"
    if settings.compute_partition in (None, wrong[0].label.partition("/")[0]):
        field = "memory-partition"
    value = settings.compute_partition if field == "compute-partition" else settings.memory_partition
    found = ", ".join(f"card {place.card.index} is {place.accelerator.name} {place.label}" for place in wrong[:4])
    more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
    remedy = (
        f"request amd.com/{_asked_mode(settings, wrong[0].label).lower().replace('/', '_')}, or correct the annotation"
        if in_pod
        else "`aim-profile steps` lays out how to switch, or correct the setting"
    )
    raise Refused(f"{field} {value}: {found}{more}", field=field, value=value, remedy=remedy)


def _asked_mode(settings: RuntimeSettings, label: str) -> str:
    """The mode as the settings want it; what they leave open is as it is."""
    compute, _, memory = label.partition("/")
    return f"{settings.compute_partition or compute}/{settings.memory_partition or memory}"


def _mode(card: Card, accelerator: Accelerator, settings: RuntimeSettings) -> tuple[str, tuple[str, ...]]:
    """`CPX/NPS4` and notes. What the card does not show here is as the settings claim, and said to be.

    Raises Refused where neither says it.
    """
    if not accelerator.partitionable:
        return "SPX/NPS1", ()
    compute, memory = card.compute_partition, card.memory_partition
    if compute and memory:
        return f"{compute}/{memory}", ()
    claimed = compute or settings.compute_partition
    if claimed is None:
        raise Refused(
            f"card {card.index}: its partition mode is not readable here ({card.mode_text})",
            field="compute-partition",
            remedy="say which it is (and memory-partition), or mount /sys",
        )
    known = memory or settings.memory_partition
    label = f"{claimed}/{known}" if known else accelerator.mode(claimed).label
    return label, (f"card {card.index} shows {card.mode_text} here: {label} is taken for it, not read",)


def _grouped(placed: Iterable[_Placed], case: Case) -> list[Kind]:
    groups: dict[tuple[str, str, AllocMode], list[_Placed]] = {}
    for place in placed:
        key = (place.accelerator.name, place.label, place.card.alloc_mode or "CAPPING")
        groups.setdefault(key, []).append(place)
    kinds = [_kind(places, alloc_mode, case) for (_, _, alloc_mode), places in groups.items()]
    found = [kind for kind in kinds if kind.devices]
    if not found:
        raise Refused(
            "no device is left: the cards' partitions are not readable here, or all are taken",
            field="devices",
            remedy="see `aim-profile node`",
        )
    return found


def _kind(places: list[_Placed], alloc_mode: AllocMode, case: Case) -> Kind:
    first = places[0]
    deployment: Deployment = "bare-metal" if case.node.deployment == "unknown" else case.node.deployment
    mode = first.accelerator.mode(first.label, deployment)
    devices = tuple(device for place in places for device in devices_of(place.card) if case.may_have(device.at))
    sizes = [device.memory_mib for device in devices if device.memory_mib]
    if sizes and alloc_mode == "CAPPING":  # under ALL a device reports what its siblings have, too
        mode = mode.model_copy(update={"memory_mib": min(sizes)})
    return Kind(mode, alloc_mode, devices, tuple(note for place in places for note in place.notes))


def devices_of(card: Card) -> tuple[Device, ...]:
    """A card's devices, as they are assigned."""
    return tuple(
        Device(
            card=card.index,
            partition=part.index,
            memory_mib=part.memory_mib,
            compute_units=part.compute_units,
            render_minor=part.render_minor,
        )
        for part in card.partitions
    )


def _shared_as_asked(kind: Kind, settings: RuntimeSettings) -> bool:
    if settings.gpu_sharing == "disabled":
        return kind.whole_cards
    return settings.gpu_sharing is None or not kind.whole_cards or settings.memory_limit is not None


def _refuse_sharing(kinds: list[Kind], settings: RuntimeSettings) -> list[Kind]:
    disabled = settings.gpu_sharing == "disabled"
    raise Refused(
        f"gpu-sharing {settings.gpu_sharing}: {kinds[0].label} is {'a part of a card' if disabled else 'a whole card'}",
        field="gpu-sharing",
        value=settings.gpu_sharing,
        remedy="ask for a whole card" if disabled else "set memory-limit, or ask for a partition",
    )


def side_by_side(kind: Kind, count: int, settings: RuntimeSettings, *, in_pod: bool) -> tuple[tuple[Device, ...], str]:
    """`count` devices for one model, and a note (empty where there is nothing to say): siblings of one card, or whole
    cards.

    Raises:
        Refused: not so many are here, or not on one card.
    """
    first, note = _first_partition(kind, settings, in_pod)
    if kind.whole_cards:
        found = kind.devices[:count]
    else:
        per_card: dict[int, list[Device]] = {}
        for device in kind.devices:
            if first is None or device.partition >= first:
                per_card.setdefault(device.card, []).append(device)
        found = next((tuple(devices[:count]) for devices in per_card.values() if len(devices) >= count), ())
    if len(found) == count:
        return found, note
    raise _too_few(kind, count, first)


def _first_partition(kind: Kind, settings: RuntimeSettings, in_pod: bool) -> tuple[int | None, str]:
    """The partition that the devices begin with, None: any."""
    wanted = settings.partition_id
    if wanted is None:
        return None, ""
    here = sorted({device.partition for device in kind.devices})
    if wanted in here:
        return wanted, ""
    if in_pod:
        return None, f"partition-id {wanted} is not here: the device plugin has chosen {', '.join(map(str, here))}"
    raise Refused(
        f"partition-id {wanted}: {kind.label} has partitions {_ranges(here)} here",
        field="partition-id",
        value=wanted,
        remedy="name one of them, or leave it out",
    )


def _too_few(kind: Kind, count: int, first: int | None) -> Refused:
    field = "partition-count"
    if len(kind.devices) < count or kind.whole_cards:
        here = f"{len(kind.devices)} of {kind.label} {'is' if len(kind.devices) == 1 else 'are'} here"
        return Refused(
            f"{field} {count}: {here}", field=field, value=count, remedy=f"request {count} devices, or ask for less"
        )
    beginning = f" from partition {first} on" if first is not None else ""
    return Refused(
        f"{field} {count}: no card has so many of {kind.label} side by side here{beginning}",
        field=field,
        value=count,
        remedy="tensor parallelism needs siblings of one card: request them by DRA (matchAttribute parentDeviceID), "
        "or a whole card",
    )


def check_count(kind: Kind, case: Case) -> None:
    """In a pod of one model partition-count is what was requested: more or fewer devices are a mistake.

    Raises Refused.
    """
    wanted, here = case.settings.partition_count, len(kind.devices)
    if case.in_pod and case.bound is None and wanted is not None and wanted != here:
        raise Refused(
            f"partition-count {wanted}: {here} {'device is' if here == 1 else 'devices are'} here ({kind.label})",
            field="partition-count",
            value=wanted,
            remedy=f"request {wanted} of them, or set partition-count to {here}",
        )


def check_limit(kind: Kind, settings: RuntimeSettings) -> None:
    """Raises Refused for a memory-limit above what one device of that kind has."""
    limit, has = settings.memory_limit, kind.mode.memory_bytes
    if limit is not None and limit > has:
        raise Refused(
            f"memory-limit {limit / GIB:.3f} GiB: one {kind.label} has {has / GIB:.3f} GiB, {(limit - has) / GIB:.3f} "
            "GiB less",
            field="memory-limit",
            value=limit,
            remedy="set it to at most that, or ask for a larger partition",
            shortfall_gib=round((limit - has) / GIB, 3),
        )


def _ranges(numbers: Sequence[int]) -> str:
    """`0-7`, or the numbers one by one where one is missing."""
    if len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{numbers[0]}-{numbers[-1]}"
    return ", ".join(map(str, numbers))


def labels(kinds: Iterable[Kind]) -> Mapping[str, int]:
    """How many devices of each kind there are."""
    return {kind.label: len(kind.devices) for kind in kinds}
