"""The error tree of aim_profile: each error names the field, the value and the remedy."""

from __future__ import annotations

from functools import partial
from typing import Self


class AimProfileError(Exception):
    """Bad input or an unusable fact. `str()` is one line for people; the parts serve machines.

    field: what was asked or read (`partition`, `gpu`, a path …); value: what stood there;
    remedy: what to do about it.
    """

    def __init__(self, problem: str, *, field: str, value: object = None, remedy: str = "") -> None:
        self.problem = problem
        self.field = field
        self.value = value
        self.remedy = remedy
        super().__init__(f"{problem}; {remedy}" if remedy else problem)

    def __reduce__(self) -> tuple[partial[Self], tuple[()]]:
        """It reaches other processes as it is."""
        kept = partial(type(self), self.problem, field=self.field, value=self.value, remedy=self.remedy)
        return kept, ()


class CatalogError(AimProfileError):
    """A catalogue file of our own is missing or contradicts itself."""


class GpuError(AimProfileError):
    """No accelerator of that name, or one that is not established."""


class PartitionError(AimProfileError):
    """A partition mode that does not exist, or does not exist on that accelerator."""


class NodeError(AimProfileError):
    """A node's files or amd-smi's output could not be understood. `field` is the path or key."""


class ModelError(AimProfileError):
    """A model id, directory or file that cannot be used."""


class UnknownModelError(ModelError):
    """Not in the catalogue, or no such repository. `remedy` names the right id where there is one."""


class SizingError(AimProfileError):
    """A request that cannot be sized: missing facts, an impossible shape, a bad number."""
