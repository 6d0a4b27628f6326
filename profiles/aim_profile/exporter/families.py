"""An observation as Prometheus' families. What is not known has no series: never 0, never a guess."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from aim_profile.nodes.facts import Card, Node, Partition
from aim_profile.plans.dcm import Strategy, mode_label
from aim_profile.units import MIB

from .observe import Observation, Observer
from .prices import Prices

_CARD = ("node", "card")
_PARTITION = ("node", "card", "partition")
_MODES = ("compute_mode", "memory_mode", "allocation_mode")


class NodeCollector(Collector):
    """Looks at the node at each scrape."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer

    def describe(self) -> Iterator[Metric]:
        """Nothing: registering it is no reason to read the node."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """What prometheus_client asks for at each scrape."""
        return families(self._observer.look())


def families(seen: Observation) -> Iterator[Metric]:
    """Every family that has a series."""
    yield from (family for family in _all(seen) if family.samples)


def _all(seen: Observation) -> Iterator[Metric]:
    ok = _family("aim_node_source_ok", "1 if the kernel's files, the plan, the prices could be read.", "node", "source")
    for source, good in seen.ok.items():
        ok.add_metric([seen.name, source], good)
    yield ok
    if seen.node is not None:
        yield _node(seen.name, seen.node)
        yield from _cards(seen, seen.node)
        yield from _partitions(seen, seen.node)
    yield from _drift(seen)
    if seen.prices is not None:
        yield from _prices(seen, seen.prices)


def _node(name: str, node: Node) -> Metric:
    info = _family("aim_node_info", "1: how the node was read, and how it is run.", "node", "backend", "deployment")
    info.add_metric([name, node.backend, _known(node.deployment)], 1)
    return info


def _cards(seen: Observation, node: Node) -> Iterator[Metric]:
    info = _family("aim_card_info", "1 for each card: what it is and its modes.", *_CARD, *_ABOUT_A_CARD)
    used = _family("aim_card_memory_used_bytes", "Memory of the whole card in use.", *_CARD)
    total = _family("aim_card_memory_total_bytes", "Memory of the whole card.", *_CARD)
    for card in node.cards:
        place = [seen.name, str(card.index)]
        info.add_metric([*place, *_about(card)], 1)
        if use := seen.vram.get(card.index):
            used.add_metric(place, use.used)
            total.add_metric(place, use.total)
    yield from (info, used, total)


_ABOUT_A_CARD = ("product", "gfx", "bdf", *_MODES)


def _about(card: Card) -> Sequence[str]:
    modes = (card.compute_partition, card.memory_partition, card.alloc_mode)
    return (_known(card.product), card.gfx or "", card.bdf or "", *(mode or "" for mode in modes))


def _partitions(seen: Observation, node: Node) -> Iterator[Metric]:
    info = _family("aim_partition_info", "1 for each device: its resource's name.", *_PARTITION, "resource")
    units = _family("aim_partition_compute_units", "Compute units of the device, or cores of a CPU set.", *_PARTITION)
    total = _family("aim_partition_memory_total_bytes", "Memory the device reports.", *_PARTITION, "source")
    used = _family("aim_partition_memory_used_bytes", "Memory in use, of a card that is one device.", *_PARTITION)
    for card in node.cards:
        resource = _resource(card, seen.strategy)
        for part in card.partitions:
            place = [seen.name, str(card.index), str(part.index)]
            info.add_metric([*place, resource], 1)
            if part.compute_units is not None:
                units.add_metric(place, part.compute_units)
            if part.memory_mib is not None:
                total.add_metric([*place, part.memory_source or ""], part.memory_mib * MIB)
            # The kernel tells what a whole card uses: of its partitions nothing follows.
            if (use := seen.vram.get(card.index)) and _is_whole(card, part):
                used.add_metric(place, use.used)
    yield from (info, units, total, used)


def _is_whole(card: Card, part: Partition) -> bool:
    alone = len(card.partitions) == 1
    return alone and part.index == 0 and (card.partitionable is False or card.compute_partition == "SPX")


def _resource(card: Card, strategy: Strategy) -> str:
    """As the device plugin names it; empty where the mode is not known. GPUs without partition files are amd.com/gpu
    under either strategy."""
    if card.is_cpu:
        return "cpu"
    if strategy == "single" or card.partitionable is False:
        return "amd.com/gpu"
    return f"amd.com/{mode_label(card.mode_label)}" if card.mode_label else ""


def _drift(seen: Observation) -> Iterator[Metric]:
    if seen.differences is None:
        return
    count = _family("aim_plan_differences", "What is not as planned on this node; 0: all is.", "node")
    count.add_metric([seen.name], len(seen.differences))
    drift = _family("aim_plan_drift", "1 for each thing that is not as planned.", *_CARD, "what")
    places = {(difference.card, difference.what) for difference in seen.differences}
    for card, what in sorted(places, key=lambda place: (place[0] is None, place[0] or 0, place[1])):
        drift.add_metric([seen.name, "" if card is None else str(card), what], 1)
    yield from (count, drift)


def _prices(seen: Observation, prices: Prices) -> Iterator[Metric]:
    hour = _family("aim_price_per_gpu_hour", "Price of an hour of the whole card.", *_CARD, "product", "currency")
    for card in seen.node.cards if seen.node else ():
        if (price := prices.of_card(card)) is not None:
            hour.add_metric([seen.name, str(card.index), card.product, prices.currency], price)
    yield hour
    tokens = _family(
        "aim_price_per_million_tokens", "Price of a million tokens of a model.", "model_name", "kind", "currency"
    )
    for model, price_of in prices.million_tokens.items():
        for kind, amount in (("prompt", price_of.prompt), ("generation", price_of.generation)):
            if amount is not None:
                tokens.add_metric([model, kind, prices.currency], amount)
    yield tokens


def _known(text: str) -> str:
    return "" if text == "unknown" else text


def _family(name: str, text: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, labels=labels)
