"""A plan's replicas on one node as a Compose project: partitions without Kubernetes, by the same images.

A container gets /dev/kfd and the render nodes of its own partitions. The driver's device cgroup hides the others from
it, as it does in a pod, so nothing is numbered by `*_VISIBLE_DEVICES` and the runtime is told that its devices were
chosen for it (`--binding=pod`). Format: the Compose Specification.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from aim_profile.nodes.facts import CPU, Node
from aim_profile.plans.compare import name_in_plan, plan_assert
from aim_profile.plans.plan import Placement, Plan
from aim_profile.plans.workload import Workloads
from aim_profile.serving.profile import Profile

from .devices import resources_of
from .kserve import PREFIX, flags_of, service_annotations
from .replicas import card_of, is_service, mode_of, profile_of, wanted_of
from .serving_runtime import image_of
from .target import RenderError

_FIRST_PORT = 8100
_CACHE = "/workspace/model-cache"
_RENDER_GROUP = "${RENDER_GID:?the group that owns the devices: stat -c %g /dev/kfd}"
#: What stands above the document.
COMMENT = """Partitions without Kubernetes: each service has the render nodes of its own. On the node:
  RENDER_GID=$(stat -c %g /dev/kfd) docker compose up --wait
The render nodes are numbered anew when the mode changes: then render it again."""
# Of every container.
_SAME: Mapping[str, Any] = {
    "group_add": [_RENDER_GROUP],
    "volumes": [f"models:{_CACHE}"],
    "shm_size": "8gb",
    "cap_drop": ["ALL"],
    "security_opt": ["no-new-privileges:true"],
    "restart": "unless-stopped",
    "stop_grace_period": "60s",
}
# Settings of the guardrail, and the device that was chosen: in a container its number is another.
_NOT_THE_RUNTIMES = ("guardrails", "partition-id", "gpu-sharing")


class Project(NamedTuple):
    """document: what compose.yaml holds; skipped: one line for each workload that is not in it."""

    document: dict[str, Any]
    skipped: tuple[str, ...]


def project_of(
    plan: Plan,
    node: Node,
    name: str | None = None,
    workloads: Workloads | None = None,
    storage_uris: Mapping[str, str] | None = None,
    image: str | None = None,
) -> Project:
    """The replicas that the plan puts on that node. name: the node's in the plan, its own when None; storage_uris: by
    workload, for models that are not on the hub, as the runtime's --model_uri takes them.

    Raises RenderError where the node is not as planned, its render nodes are not known, or nothing of the plan serves
    there; PlanError where the plan has no such node.
    """
    named = name_in_plan(node, plan, name)
    if wrong := plan_assert(node, plan, named):
        first = wrong[0]
        raise RenderError(
            f"{named} is not as planned: {first.what} is {first.found}, planned {first.planned}",
            field=first.what,
            value=first.found,
            remedy="`aim-profile steps` lays out the way there, `aim-profile assert` shows all differences",
        )
    here = [placement for placement in plan.placements if placement.node == named]
    served, skipped = _served(plan, here)
    if not served:
        raise RenderError(
            f"{named}: the plan serves nothing there", field="node", value=named, remedy="name another node"
        )
    described = {workload.name: workload for workload in workloads.workloads} if workloads else {}
    cards = {(card.node, card.card): card for card in plan.cards}
    services = {}
    for port, placement in enumerate(served, _FIRST_PORT):
        mode = mode_of(placement, card_of(cards, placement))
        profile = profile_of(placement, mode, wanted_of(placement, described.get(placement.workload)))
        uri = (storage_uris or {}).get(placement.workload) or f"hf://{profile.model_id}"
        services[f"{placement.workload}-{placement.replica}"] = {
            "image": image or image_of("aim-runtime"),
            "command": [_escaped(word) for word in _command(placement, profile, uri)],
            "environment": {
                "HF_TOKEN": "${HF_TOKEN:-}",
                **{name: _escaped(value) for name, value in profile.env_vars.items()},
            },
            "devices": [f"{path}:{path}" for path in ("/dev/kfd", *_render_nodes(node, placement))],
            "mem_limit": _bytes(resources_of(None, placement.tp, mode)["limits"]["memory"]),
            "networks": {"default": {"aliases": [placement.workload]}},
            "ports": [f"127.0.0.1:{port}:8080"],
            "healthcheck": _healthcheck(placement.workload),
            **_SAME,
        }
    return Project({"name": "aim", "services": services, "volumes": {"models": {}}}, tuple(skipped))


def _served(plan: Plan, here: Sequence[Placement]) -> tuple[list[Placement], list[str]]:
    cards = {(card.node, card.card): card for card in plan.cards}
    served: list[Placement] = []
    skipped: dict[str, str] = {}
    for placement in here:
        if not is_service(placement):
            what = f"a {placement.kind} workload" if placement.kind != "serve" else "a workload without a model"
            skipped[placement.workload] = f"{placement.workload}: {what} is none of the runtime's"
        elif card_of(cards, placement).gpu == CPU:
            skipped[placement.workload] = f"{placement.workload}: on CPU sets, not on a GPU"
        else:
            served.append(placement)
    return served, list(skipped.values())


def _command(placement: Placement, profile: Profile, uri: str) -> list[str]:
    """What the runtime is told: in a pod the same stands in annotations."""
    said = {
        key.removeprefix(PREFIX): value
        for key, value in service_annotations(profile).items()
        if key.startswith(PREFIX) and key.removeprefix(PREFIX) not in _NOT_THE_RUNTIMES
    }
    flags = [f"--{key.replace('-', '_')}={value}" for key, value in said.items() if key != "profile"]
    source = [f"--model_uri={uri}", "--fetch"]
    return [
        f"--model_name={placement.workload}",
        *source,
        "--engine=vllm",
        "--binding=pod",
        *flags,
        *flags_of(profile),
    ]


def _render_nodes(node: Node, placement: Placement) -> Iterator[str]:
    cards = {card.index: card for card in node.cards}
    for card, partition in placement.devices:
        minor = next(part.render_minor for part in cards[card].partitions if part.index == partition)
        if minor is None:
            raise RenderError(
                f"{placement.id}: the render node of card {card} partition {partition} is not known",
                field="render_minor",
                value=None,
                remedy="run it on the node itself, or give --node a file that `aim-profile node export` wrote there",
            )
        yield f"/dev/dri/renderD{minor}"


def _healthcheck(model: str) -> dict[str, Any]:
    """What Kubernetes' readiness probe asks. The model is fetched and loaded before that."""
    asked = f"import urllib.request as r; r.urlopen('http://127.0.0.1:8080/v2/models/{model}/ready')"
    return {"test": ["CMD", "python", "-c", asked], "interval": "10s", "timeout": "5s", "start_period": "30m"}


def _bytes(quantity: str) -> str:
    """Compose's of Kubernetes': both count by 1024."""
    return quantity.replace("Gi", "gb")


def _escaped(text: str) -> str:
    """Compose reads $ as a variable."""
    return text.replace("$", "$$")
