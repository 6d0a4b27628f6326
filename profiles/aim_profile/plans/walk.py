"""The walk: ordered steps carried out on nodes, and every switch checked before anything is placed.

`amd-smi set` can exit 0 without switching, and a plugin can miss partitions (ROCm/k8s-device-plugin#157): what a node
reads back and what it advertises must both be as planned.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from aim_profile.errors import AimProfileError
from aim_profile.nodes.facts import Node

from .compare import Difference, allocatable_difference, plan_assert
from .plan import Plan, cards_by_node
from .steps import Step, Steps


class StepError(AimProfileError):
    """A step that did not do what it said. `field` is the step's number; nothing after it was done."""

    def __init__(self, step: Step, differences: tuple[Difference, ...]) -> None:
        self.step, self.differences = step, differences
        look = "device plugin's log" if step.action == "await" else "Device Config Manager's events"
        super().__init__(
            f"step {step.number}: {step.node} is not as planned after the switch: "
            + "; ".join(difference.message for difference in differences),
            field=f"steps[{step.number}]",
            value=step.node,
            remedy=f"the node stays drained; look at the {look}, then plan again",
        )


class Executor(Protocol):
    """What carries steps out on real (or emulated) nodes. Each call returns when the step is done."""

    def stop(self, step: Step) -> None:
        """Stop step.replicas."""

    def drain(self, step: Step) -> None:
        """Cordon the node, set step.taint, wait until step.replicas have stopped."""

    def switch(self, step: Step) -> None:
        """Set step.set_labels and wait for step.await_labels."""

    def read(self, node: str) -> Node:
        """What the node's devices are now, read from the node."""

    def refresh(self, step: Step) -> None:
        """Remove step.taint, leave the node cordoned, restart the pods of step.restart there until they are ready."""

    def allocatable(self, step: Step) -> Mapping[str, int]:
        """Wait for step.allocatable and step.await_labels as long as is sensible; the `amd.com/` resources by then."""

    def undrain(self, step: Step) -> None:
        """Uncordon the node."""

    def place(self, step: Step) -> None:
        """Start step.replicas where the plan says."""


def apply_steps(steps: Steps, plan: Plan, executor: Executor) -> tuple[Step, ...]:
    """Carry the steps out in order. Raises StepError when a node's read-back, or what it advertises, differs."""
    done = []
    cards = cards_by_node(plan.cards)
    for step in steps.steps:
        if step.action == "verify":
            _checked(step, plan_assert(executor.read(step.node), plan, step.node, cards[step.node]))
        elif step.action == "await":
            _checked(step, allocatable_difference(step.node, step.allocatable, executor.allocatable(step)))
        else:
            {
                "stop": executor.stop,
                "drain": executor.drain,
                "switch": executor.switch,
                "refresh": executor.refresh,
                "undrain": executor.undrain,
                "place": executor.place,
            }[step.action](step)
        done.append(step)
    return tuple(done)


def _checked(step: Step, differences: tuple[Difference, ...]) -> None:
    if differences:
        raise StepError(step, differences)
