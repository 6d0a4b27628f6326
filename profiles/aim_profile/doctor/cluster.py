"""What Kubernetes says of the node, from files kubectl wrote: is it what the node's own kernel says?

Labels are those of AMD's node labeller, resources those of its device plugin; the DRA driver's devices stand in
ResourceSlices instead. A switch leaves both behind until they are restarted (gpu-operator#420), and a device plugin
may miss partitions (k8s-device-plugin#157), so that the kernel's count is the witness.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict

from aim_profile.errors import NodeError
from aim_profile.files.read import check, read_parsed
from aim_profile.nodes.facts import Card, Node
from aim_profile.plans.dcm import PARTITION_LABEL, STATE_LABEL, mode_label

from .finding import Finding, error, ok, unknown, warning

_PREFIX = "amd.com/"
_DRA = "gpu.amd.com"
_SWITCHING = "amd-dcm"
_Object = TypeVar("_Object", bound=BaseModel)
_ALLOCATABLE, _LABELS = "allocatable", "labels"


class _OfKubernetes(BaseModel):
    """Kubernetes' objects have more keys than are needed here."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class _Metadata(_OfKubernetes):
    name: str
    labels: dict[str, str] = {}


class _Taint(_OfKubernetes):
    key: str
    effect: str = ""


class _Spec(_OfKubernetes):
    unschedulable: bool = False
    taints: tuple[_Taint, ...] = ()


class _Condition(_OfKubernetes):
    type: str
    status: str


class _Status(_OfKubernetes):
    allocatable: dict[str, str | int]
    conditions: tuple[_Condition, ...] = ()


class KubeNode(_OfKubernetes):
    """`kubectl get node NAME -o json`."""

    kind: Literal["Node"]
    metadata: _Metadata
    spec: _Spec = _Spec()
    status: _Status

    @property
    def resources(self) -> dict[str, int]:
        """What it advertises of AMD's, by name. Raises NodeError for what is no count."""
        return {
            name: _count(name, value) for name, value in self.status.allocatable.items() if name.startswith(_PREFIX)
        }


class _Slice(_OfKubernetes):
    driver: str
    nodeName: str | None = None
    devices: tuple[dict[str, Any], ...] = ()


class _SliceItem(_OfKubernetes):
    kind: Literal["ResourceSlice"]
    spec: _Slice


class _SliceList(_OfKubernetes):
    kind: Literal["List", "ResourceSliceList"]
    items: tuple[_SliceItem, ...]


def load_kube_node(file: Path) -> KubeNode:
    """Raises NodeError naming the file, the key and the remedy."""
    return _load(KubeNode, file, "give what `kubectl get node NAME -o json` writes")


def load_slices(file: Path, node: str) -> int:
    """How many devices AMD's DRA driver offers on the node of that name. Raises NodeError as above."""
    found = _load(_SliceList, file, "give what `kubectl get resourceslices -o json` writes")
    slices = [item.spec for item in found.items if item.spec.driver == _DRA and item.spec.nodeName == node]
    return sum(len(one.devices) for one in slices)


def _load(model: type[_Object], file: Path, remedy: str) -> _Object:
    parsed = read_parsed(file, NodeError)
    if not isinstance(parsed.raw, dict):
        raise NodeError(f"{file}: no Kubernetes object", field="kind", value=str(file), remedy=remedy)
    try:
        return check(model, parsed.raw, parsed.named, NodeError, parsed.text)
    except NodeError as problem:
        raise NodeError(problem.problem, field=problem.field, value=problem.value, remedy=remedy) from problem


def _count(name: str, value: str | int) -> int:
    text = str(value)
    if text.isascii() and text.isdecimal() and len(text) < 7:
        return int(text)
    raise NodeError(
        f"status.allocatable: {name}: {text[:40]!r} is not a number of devices",
        field=name,
        remedy="read the node again",
    )


def cluster(kube: KubeNode, node: Node, driver: str | None, where: str, slices: int | None) -> Iterator[Finding]:
    """driver: amdgpu's version on the node; slices: devices of the DRA driver, None where nobody gave them."""
    cards = [card for card in node.cards if not card.is_cpu]
    yield from _schedulable(kube, where)
    if node.name and node.name != kube.metadata.name:
        remedy = "give the file of the node that is looked at; else ignore this"
        yield warning("node", f"the file is of {kube.metadata.name}, the node's name is {node.name}", where, remedy)
    yield _offered(slices, kube, cards, where) if slices else _advertised(kube.resources, cards, where)
    yield from _labels(kube.metadata.labels, cards, driver, where)


def _schedulable(kube: KubeNode, where: str) -> Iterator[Finding]:
    ready = next((one.status for one in kube.status.conditions if one.type == "Ready"), None)
    if ready is None:
        yield unknown("node", "no Ready condition", where, "give the whole object")
    elif ready != "True":
        yield error("node", f"Ready is {ready}", where, "`kubectl describe node`, and the kubelet's log on the node")
    else:
        yield ok("node", "Ready", where)
    if kube.spec.unschedulable:
        yield warning("node", "cordoned: nothing new is placed on it", where, "`kubectl uncordon` once it may be used")
    if any(taint.key == _SWITCHING for taint in kube.spec.taints):
        remedy = f"when the switch is over: `kubectl taint node NAME {_SWITCHING}-`"
        yield warning("node", f"tainted {_SWITCHING}: a switch of modes is under way, or was left", where, remedy)


def _advertised(found: dict[str, int], cards: Sequence[Card], where: str) -> Finding:
    """The device plugin's resources beside the kernel's devices, under either of its naming strategies."""
    devices = sum(len(card.partitions) for card in cards)
    if not found:
        remedy = "start the device plugin; where the DRA driver serves the node, give --resource-slices"
        return error(_ALLOCATABLE, "nothing of amd.com is allocatable", where, remedy)
    shown = ", ".join(f"{name}: {count}" for name, count in sorted(found.items()))
    restart = "restart the device plugin's pod of this node"
    if not cards:
        return unknown(_ALLOCATABLE, f"{shown}; the node's own devices are not known", where, "see `cards`")
    if sum(found.values()) != devices:
        remedy = f"{restart}; if it stays so, update it: some miss partitions (k8s-device-plugin#157)"
        return error(_ALLOCATABLE, f"{shown}, but the kernel shows {devices} devices", where, remedy)
    expected = _by_mode(cards)
    there = {name: count for name, count in found.items() if count}
    if expected is None:
        return unknown(_ALLOCATABLE, f"{shown}; not every card's mode is known", where, "see `modes`")
    if there not in (expected, {f"{_PREFIX}gpu": devices}):
        wanted = ", ".join(f"{name}: {count}" for name, count in expected.items())
        return error(
            _ALLOCATABLE,
            f"{shown}, but the cards' modes make {wanted}",
            where,
            f"{restart}: it knows the modes of before",
        )
    return ok(_ALLOCATABLE, f"{shown}, as the kernel shows", where)


def _by_mode(cards: Sequence[Card]) -> dict[str, int] | None:
    """What the mixed strategy advertises; None where a card's mode is not known."""
    found: dict[str, int] = {}
    for card in cards:
        if card.partitionable is not False and card.mode_label is None:
            return None
        name = mode_label(card.mode_label) if card.mode_label and card.partitionable else "gpu"
        found[_PREFIX + name] = found.get(_PREFIX + name, 0) + len(card.partitions)
    return found


def _offered(slices: int, kube: KubeNode, cards: Sequence[Card], where: str) -> Finding:
    devices = sum(len(card.partitions) for card in cards)
    if any(kube.resources.values()):
        seen = f"{slices} devices by the DRA driver, and resources of the device plugin as well"
        return error(_ALLOCATABLE, seen, where, "run one of them: they give the same device away twice")
    if not cards:
        seen = f"{slices} devices by the DRA driver; the node's own devices are not known"
        return unknown(_ALLOCATABLE, seen, where, "see `cards`")
    if slices != devices:
        remedy = "restart the DRA driver's pod of this node; it must be 1.0.1 or newer for partitions"
        return error(_ALLOCATABLE, f"{slices} devices by the DRA driver, but the kernel shows {devices}", where, remedy)
    return ok(_ALLOCATABLE, f"{slices} devices by the DRA driver, as the kernel shows", where)


def _labels(labels: dict[str, str], cards: Sequence[Card], driver: str | None, where: str) -> Iterator[Finding]:
    state = labels.get(STATE_LABEL)
    if state is not None and state != "success":
        remedy = "`kubectl describe node` names the event; correct the profile, or quit what holds /dev/kfd"
        yield error(_LABELS, f"the Device Config Manager's last switch: {state}", where, remedy)
    if not any(name.startswith(f"{_PREFIX}gpu.") for name in labels):
        remedy = "start AMD's node labeller: selectors by product and mode match nothing"
        yield warning(_LABELS, "none of AMD's", where, remedy)
        return
    wrong = 0
    for name, expected in _expected(cards, driver).items():
        found = labels.get(name)
        # A driver's version may have a build behind it, which is not compared.
        if found is not None and expected and found not in expected and found.partition("-")[0] not in expected:
            wrong += 1
            seen = f"{name} is {found}, the node is {' or '.join(sorted(expected))}"
            yield error(_LABELS, seen, where, "restart the node labeller's pod of this node (gpu-operator#420)")
    if not wrong:
        yield ok(_LABELS, "as the node is, as far as they are there", where)


def _expected(cards: Sequence[Card], driver: str | None) -> dict[str, set[str]]:
    """What each label may say; empty: not known. A node of unlike cards has none of these labels, but counts."""
    units = {str(part.compute_units) for card in cards for part in card.partitions if part.compute_units}
    return {
        PARTITION_LABEL: {mode_label(card.mode_label) for card in cards if card.mode_label},
        "amd.com/gpu.device-id": {card.pci_id.removeprefix("0x") for card in cards if card.pci_id},
        "amd.com/gpu.cu-count": units,
        "amd.com/gpu.driver-version": {driver} if driver else set(),
    }
