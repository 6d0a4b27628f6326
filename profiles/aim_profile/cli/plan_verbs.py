"""The verbs about plans, and `render`, which also takes profiles: their options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import (
    PLANS,
    AllocationOption,
    AmdSmiOption,
    AutoPartitionOption,
    DeploymentOption,
    EvidenceOption,
    GpuOption,
    NodeOption,
    OutOption,
    OutputOption,
    PartitionOption,
    RootOption,
    StrategyOption,
    Tier,
    guarded,
)


def add_to(app: typer.Typer) -> None:
    """Register the verbs, in the order a plan is worked with."""
    for name, verb in (("plan", plan), ("diff", diff), ("assert", assert_plan), ("steps", steps), ("render", render)):
        app.command(name, rich_help_panel=PLANS)(verb)


def plan(
    fleet: Annotated[
        str, typer.Argument(help="A fleet file, an emulation file, a recorded tree, or `live`: this machine.")
    ],
    workloads: Annotated[Path, typer.Argument(help="A workloads file.")],
    tier: Annotated[Tier, typer.Option(help="The least a partition mode must be.")] = "validated",
    allow_mixed_compute: Annotated[
        bool, typer.Option("--allow-mixed-compute", help="Cards of one node in different compute modes.")
    ] = False,
    current: Annotated[Path | None, typer.Option(help="What runs now, as a plan: it stays where it is.")] = None,
    previous: Annotated[
        Path | None, typer.Option(help="A plan, taken as carried out: change as little of it as possible, say what.")
    ] = None,
    allow_eviction: Annotated[
        bool,
        typer.Option("--allow-eviction", help="With --current, --previous: low priority may move or stop for others."),
    ] = False,
    exact: Annotated[bool, typer.Option("--exact", help="Prove the best plan by OR-Tools' CP-SAT.")] = False,
    exact_time_limit: Annotated[float, typer.Option(help="Seconds for each level of its objective.", min=0.01)] = 10.0,
    accept_bound: Annotated[
        bool, typer.Option("--accept-bound", help="Replicas from a load even where only a bound is known.")
    ] = False,
    at: Annotated[
        str | None, typer.Option(help="With windows: the plan in force at this time of day, as 23:30, alone.")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse a fleet that holds a node of an unknown product.")
    ] = False,
    svg: Annotated[Path | None, typer.Option(help="Draw the fleet into this file.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the plan to this file too (.json: as JSON).")] = None,
    evidence: EvidenceOption = None,
    output: OutputOption = "table",
) -> None:
    """Give every replica its device and every card its mode. Exit 1 if a replica has none, with what would help.

    Workloads with windows get a plan for each part of the day, each written to a file of its own (plan.2200-0600.yaml).

    Example: `aim-profile plan fleet.yaml workloads.yaml --out plan.yaml --svg plan.svg`
    """
    from aim_profile.plans.plan import PlanOptions

    from . import plans

    def verb() -> int:
        options = PlanOptions(
            tier=tier,
            allow_mixed_compute=allow_mixed_compute,
            allow_eviction=allow_eviction,
            exact=exact,
            exact_time_limit_s=exact_time_limit,
            accept_bound=accept_bound,
        )
        files = {"current": current, "previous": previous, "svg": svg, "out": out, "evidence": evidence}
        return plans.plan(output, fleet, workloads, options, strict=strict, at=at, **files)

    guarded(verb)


def diff(
    old: Annotated[Path, typer.Argument(help="A plan.")],
    new: Annotated[Path, typer.Argument(help="Another plan.")],
    output: OutputOption = "table",
) -> None:
    """What the new plan changes: modes of cards, replicas that come, go or move. Exit 1 if anything.

    Example: `aim-profile diff yesterday.yaml plan.yaml`
    """
    from . import steps

    guarded(lambda: steps.diff(output, old, new))


def assert_plan(
    plan: Annotated[Path, typer.Argument(help="A plan.")],
    root: RootOption = None,
    amd_smi: AmdSmiOption = None,
    node: NodeOption = None,
    name: Annotated[str | None, typer.Option(help="The node's name in the plan; its own when left out.")] = None,
    output: OutputOption = "table",
) -> None:
    """Is this node as planned? Exit 1 and what is not: cards, modes, partitions, memory.

    Example: `aim-profile assert plan.yaml` on the node itself, or `--node node.yaml` for a recorded one.
    """
    from . import device, steps

    guarded(lambda: steps.assert_plan(output, plan, device.find_node(root, amd_smi or (), node), name))


def steps(
    current: Annotated[Path, typer.Argument(help="What is now: a plan, or a fleet or emulation file: nothing runs.")],
    plan: Annotated[Path, typer.Argument(help="The plan to reach.")],
    max_parallel: Annotated[int, typer.Option(help="Nodes drained at once.", min=1)] = 1,
    surge: Annotated[int, typer.Option(help="Replicas that may run twice for a moment while they move.", min=0)] = 0,
    strategy: StrategyOption = "mixed",
    output: OutputOption = "table",
) -> None:
    """The way to a plan, node by node: drain, switch, read back, refresh the device plugin, wait, undrain, place.

    Example: `aim-profile steps fleet.yaml plan.yaml --max-parallel 2`
    """
    from . import steps

    guarded(lambda: steps.steps(output, current, plan, max_parallel, surge, strategy))


def render(
    source: Annotated[
        str, typer.Argument(help="A plan's file, a profile's file, ORG/MODEL/PROFILE-ID, or a model with --gpu.")
    ],
    namespace: Annotated[str | None, typer.Option("--namespace", "-n", help="Of the InferenceServices.")] = None,
    strategy: StrategyOption = "mixed",
    image: Annotated[str | None, typer.Option(help="The runtime's image.")] = None,
    runtime: Annotated[
        str | None, typer.Option(help="A ClusterServingRuntime that is there already; rendered when left out.")
    ] = None,
    operator_namespace: Annotated[
        str, typer.Option(help="With a plan: where the GPU operator runs, for its ConfigMap.")
    ] = "kube-amd-gpu",
    storage_uri: Annotated[
        list[str] | None, typer.Option(help="NAME=URI of a model that is not on the hub; may be repeated.")
    ] = None,
    workloads: Annotated[Path | None, typer.Option(help="With a plan: its workloads (KV cache type, LoRA).")] = None,
    name: Annotated[str | None, typer.Option(help="With a profile: the InferenceService's name.")] = None,
    replicas: Annotated[int | None, typer.Option(help="With a profile; 1 when left out.", min=1)] = None,
    gpu: GpuOption = None,
    partition: PartitionOption = None,
    deployment: DeploymentOption = "bare-metal",
    allocation: AllocationOption = "plugin",
    auto_partition: AutoPartitionOption = False,
    cluster_queue: Annotated[
        str | None, typer.Option(help="With a plan: Kueue's ClusterQueue of that name, for what services leave.")
    ] = None,
    partition_plan: Annotated[
        str | None, typer.Option(help="With a plan: aim-operator's PartitionPlan of that name, for the ConfigMap.")
    ] = None,
    compose: Annotated[
        bool, typer.Option("--compose", help="With a plan: a Compose project for one node, without Kubernetes.")
    ] = False,
    root: RootOption = None,
    node: NodeOption = None,
    node_name: Annotated[
        str | None, typer.Option(help="With --compose: the node's name in the plan; its own when left out.")
    ] = None,
    out: OutOption = None,
) -> None:
    """Write a plan or a profile as KServe objects: ClusterServingRuntime, InferenceService, and a plan's ConfigMap.

    Example: `aim-profile render plan.yaml -n llm | kubectl apply -f -`;
    without Kubernetes `aim-profile render plan.yaml --compose --out compose.yaml` on the node itself.
    """
    from aim_profile.kubernetes.target import target_of

    from . import plans

    # What each of the two forms has no use for is refused with the other.
    of_a_cluster = {"namespace": namespace, "runtime": runtime, "cluster-queue": cluster_queue}
    of_a_cluster["partition-plan"] = partition_plan
    of_a_profile = {"name": name, "replicas": replicas, "gpu": gpu, "partition": partition}
    of_a_node = {"root": root, "node": node, "node-name": node_name}
    if compose:
        guarded(
            lambda: plans.render_compose(
                Path(source),
                (root, node, node_name),
                image=image,
                workloads=workloads,
                storage_uris=plans.storage_uris(storage_uri or ()),
                refused={**of_a_cluster, **of_a_profile},
                out=out,
            )
        )
    guarded(
        lambda: plans.render(
            source,
            target_of(
                namespace,
                strategy,
                image,
                operator_namespace,
                runtime,
                allocation=allocation,
                auto_partition=auto_partition,
                cluster_queue=cluster_queue,
                partition_plan=partition_plan,
            ),
            workloads=workloads,
            storage_uris=plans.storage_uris(storage_uri or ()),
            name=name,
            replicas=replicas,
            gpu=gpu,
            partition=partition,
            deployment=deployment,
            refused=of_a_node,
            out=out,
        )
    )
