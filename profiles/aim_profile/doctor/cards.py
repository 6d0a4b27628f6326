"""Do the witnesses agree, is every card in a mode that somebody stands for, and do the cards go together?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from aim_profile.errors import PartitionError
from aim_profile.gpus.catalog import Deployment, partition_count
from aim_profile.nodes.facts import Card, Node
from aim_profile.nodes.witnesses import Testimony

from .finding import Finding, error, ok, unknown, unreadable, warning

_CHECK = "witnesses"
_RECORD = {
    "KFD": "record /sys/class/kfd/kfd/topology/nodes as well",
    "sysfs": "record /sys/bus/pci/drivers/amdgpu as well",
    "amd-smi": "save `amd-smi list --json`, `static --json` and `partition --json`, and give them by --amd-smi",
}


def witnesses(told: Sequence[Testimony]) -> Iterator[Finding]:
    """What KFD, sysfs and amd-smi say of the same cards, each beside the first that can be understood."""
    for one in told:
        if one.problem is not None:
            yield unreadable(_CHECK, one.problem)
        elif one.cards is None:
            yield unknown(_CHECK, f"{one.witness} is not here", one.where, _RECORD[one.witness])
        elif one.hidden:
            seen = f"{one.hidden} KFD nodes are refused to this process, as in a container"
            yield unknown(_CHECK, seen, one.where, "run it on the host, or in a pod that holds every device")
    heard = [one for one in told if one.cards is not None]
    for one in heard[1:]:
        # In a container sysfs still shows every card, KFD only those that were given to it.
        if not any(other.hidden for other in heard):
            yield from _compared(heard[0], one)


def _compared(first: Testimony, other: Testimony) -> Iterator[Finding]:
    where = f"{first.where} and {other.where}"
    pairs = _pairs(first.cards or (), other.cards or ())
    if pairs is None:
        seen = (
            f"{first.witness} lists {_many(len(first.cards or ()), 'card')}, {other.witness} {len(other.cards or ())}"
        )
        yield error(
            _CHECK, seen, where, "read `dmesg | grep -e amdgpu -e kfd`; reload the driver with all GPU work stopped"
        )
        return
    wrong = [text for one, two in pairs for text in _contradictions((first.witness, one), (other.witness, two))]
    for text in wrong:
        remedy = "after a switch: restart what holds /dev/kfd, reload the driver, read again"
        yield error(_CHECK, text, where, remedy)
    if not wrong:
        yield ok(_CHECK, f"{first.witness} and {other.witness} agree on {_many(len(pairs), 'card')}", where)


def _pairs(ones: Sequence[Card], others: Sequence[Card]) -> list[tuple[Card, Card]] | None:
    """The same cards of both: by address where both have one, else by order; None where the cards are not the same."""
    if len(ones) != len(others):
        return None
    if any(card.bdf is None for card in (*ones, *others)):
        return list(zip(ones, others, strict=True))
    by_bdf = {card.bdf: card for card in others}
    if {card.bdf for card in ones} != set(by_bdf):
        return None
    return [(card, by_bdf[card.bdf]) for card in ones]


def _contradictions(one: tuple[str, Card], two: tuple[str, Card]) -> Iterator[str]:
    (name, card), (other_name, other) = one, two
    for what in ("product", "compute_partition", "memory_partition"):
        here, there = getattr(card, what), getattr(other, what)
        if here and there and here != there and "unknown" not in (here, there):
            words = what.replace("_", " ")
            yield f"card {card.index}: the {words} is {here} by {name}, {there} by {other_name}"
    # amd-smi may list the first device of a card only.
    all_shown = len(other.partitions) > (other_name == "amd-smi")
    if card.partitions and all_shown and len(card.partitions) != len(other.partitions):
        counts = f"{_devices(card)} by {name}, {len(other.partitions)} by {other_name}"
        yield f"card {card.index}: {counts}"


def _devices(card: Card) -> str:
    return _many(len(card.partitions), "device")


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def modes(node: Node, where: str) -> Iterator[Finding]:
    """Each card's mode, alone and beside those of its neighbours."""
    cards = [card for card in node.cards if not card.is_cpu]
    if not cards:
        remedy = "see `driver` and `witnesses`; without a GPU there is nothing more to look at"
        yield unknown("cards", "no AMD GPU is shown", where, remedy)
    for card in cards:
        yield _catalogued(card, where)
        yield from _mode(card, node.deployment, where)
    yield from _together(cards, where)


def _catalogued(card: Card, where: str) -> Finding:
    seen = f"card {card.index}: {card.product}, {card.mode_text}, {_devices(card)}"
    if card.accelerator is None:
        return unknown("cards", seen, where, card.report or "add the output of `amd-smi static --json` by --amd-smi")
    count = partition_count(card.accelerator.xcds, card.compute_partition) if card.compute_partition else None
    if count and len(card.partitions) != count:
        remedy = "a recording may lack KFD nodes; else stop all GPU work, reload the driver, and set the mode again"
        return error("cards", f"{seen}: {card.compute_partition} makes {count}", where, remedy)
    return ok("cards", seen, where) if card.partitions else unknown("cards", seen, where, _RECORD["KFD"])


def _mode(card: Card, deployment: Deployment | str, where: str) -> Iterator[Finding]:
    if card.accelerator is None or not card.accelerator.partitionable:
        return
    named = f"card {card.index}"
    if card.mode_label is None:
        yield unknown("modes", f"{named}: {card.mode_text}", where, f"{_RECORD['sysfs']}, or give --amd-smi")
        return
    taken: Deployment = deployment if deployment in ("passthrough", "sr-iov") else "bare-metal"
    remedy = f"`aim-profile gpus {card.accelerator.name} --deployment {taken}` lists the modes; plan one AMD validates"
    try:
        tier = card.accelerator.mode(card.mode_label, taken).tier
    except PartitionError as problem:
        yield error("modes", f"{named}: {problem.problem}", where, remedy)
        return
    seen = f"{named}: {card.mode_label} is {tier} on {taken}"
    if tier != "validated":
        yield (warning if tier == "driver-legal" else error)("modes", seen, where, remedy)
    elif deployment == "unknown":
        seen += "; whether this is a virtual machine is not readable"
        yield unknown("modes", seen, "/proc/cpuinfo", "record /proc/cpuinfo as well")
    else:
        yield ok("modes", seen, where)
    if card.alloc_mode == "ALL" and len(card.partitions) > 1:
        seen = f"{named}: allocation mode ALL, so each partition sees its siblings' memory, unprotected"
        yield warning("modes", seen, where, "`amd-smi set -a CAPPING`, unless every server is given its share itself")


def _together(cards: Sequence[Card], where: str) -> Iterator[Finding]:
    memory = sorted({card.memory_partition for card in cards if card.memory_partition})
    if len(memory) > 1:
        remedy = "set one memory mode for the whole node: `amd-smi set -M` with all GPU work stopped"
        yield error("modes", f"cards in {' and '.join(memory)}: AMD supports one memory mode a node", where, remedy)
    compute = sorted({card.compute_partition for card in cards if card.compute_partition})
    if len(compute) > 1:
        remedy = "set one compute mode, or run the device plugin with `-resource_naming_strategy mixed`"
        yield warning("modes", f"cards in {' and '.join(compute)}: AMD does not recommend it", where, remedy)
