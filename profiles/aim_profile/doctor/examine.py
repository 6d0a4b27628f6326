"""All checks of one node, and what they found."""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from aim_profile.errors import NodeError
from aim_profile.nodes.facts import Node
from aim_profile.nodes.read import load_emulated, read_node
from aim_profile.nodes.witnesses import read_witnesses
from aim_profile.plans.compare import plan_assert
from aim_profile.plans.plan import Plan

from .cards import modes, witnesses
from .cluster import KubeNode, cluster
from .driver import compatibility, driver, versions
from .finding import SEVERITIES, Finding, Severity, error, ok, unknown, unreadable
from .process import device_files, shared_memory, variables
from .system import System


class Asked(NamedTuple):
    """Which node, and what to hold it against. root and emulated None: this machine, or the one that amd_smi is of."""

    root: Path | None = None
    emulated: Path | None = None
    amd_smi: Sequence[Path] = ()
    plan: tuple[Plan, str, str | None] | None = None  # the plan, its file, the node's name in it
    kube: tuple[KubeNode, str] | None = None  # the node by Kubernetes, its file
    slices: int | None = None  # devices of the DRA driver on it


class Examination(NamedTuple):
    """node: empty where it could not be read; versions None: not readable here."""

    findings: tuple[Finding, ...]
    versions: dict[str, str | None]
    node: Node
    system: System

    @property
    def counts(self) -> dict[Severity, int]:
        """Findings of each severity."""
        found = Counter(finding.severity for finding in self.findings)
        return {severity: found[severity] for severity in SEVERITIES}


def examine(asked: Asked) -> Examination:
    """Look at the node; nothing is changed.

    Raises NodeError for an emulation file or a root that is none; a kernel file that is not as the kernel writes it is
    a finding. Raises PlanError where the plan has no such node.
    """
    system = _system(asked)
    node, problem = _node(asked)
    findings = tuple(_findings(asked, system, node, problem))
    ours = {"aim-profile": version("aim-kserve"), "python": platform.python_version()}
    ordered = sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))
    return Examination(tuple(ordered), {**ours, **versions(system)}, node, system)


def _system(asked: Asked) -> System:
    if asked.emulated is not None or (asked.root is None and asked.amd_smi):
        return System(None)
    if asked.root is None:
        return System(Path("/"), live=True, environment=dict(os.environ))
    return System(asked.root)


def _node(asked: Asked) -> tuple[Node, NodeError | None]:
    if asked.emulated is not None:
        return load_emulated(asked.emulated), None
    first: NodeError | None = None
    # The tree stands for itself where saved output is not of it.
    for files in [asked.amd_smi, *([()] if asked.root is not None and asked.amd_smi else [])]:
        try:
            return read_node(asked.root, files), first
        except NodeError as problem:
            if problem.field == "root":
                raise
            first = first or problem
    return Node(backend="none"), first


def _findings(asked: Asked, system: System, node: Node, problem: NodeError | None) -> Iterator[Finding]:
    saved = ", ".join(map(str, asked.amd_smi)) if asked.root is None else ""
    where = str(asked.emulated or asked.root or saved or "/sys")
    gpus = sum(len(card.partitions) for card in node.cards if not card.is_cpu)
    yield from driver(system)
    if asked.emulated is None:
        told = read_witnesses(asked.root, asked.amd_smi)
        yield from witnesses(told)
        if problem is not None and all(one.problem is None for one in told):
            yield unreadable("witnesses", problem)
    else:
        remedy = "run it on the node, or with --root"
        yield unknown("witnesses", "an emulated node has one witness: its file", where, remedy)
    yield from modes(node, where)
    yield from compatibility(system, node.cards)
    yield from device_files(system, node)
    yield shared_memory(system)
    yield from variables(system, gpus)
    yield from _planned(asked, node)
    if asked.kube is not None:
        kube, file = asked.kube
        yield from cluster(kube, node, versions(system)["amdgpu"], file, asked.slices)
    else:
        remedy = "give the output of `kubectl get node NAME -o json` by --kube-node"
        yield unknown("allocatable", "what Kubernetes says of the node was not given", "--kube-node", remedy)


def _planned(asked: Asked, node: Node) -> Iterator[Finding]:
    if asked.plan is None:
        return
    plan, file, name = asked.plan
    found = plan_assert(node, plan, name)
    for one in found:
        remedy = "`aim-profile steps` lays out the way to the plan; or plan again for the node as it is"
        yield error("plan", one.message, file, remedy)
    if not found:
        yield ok("plan", f"as planned: {len(node.cards)} cards, {node.devices} devices", file)
