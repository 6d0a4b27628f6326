"""Which engine serves which model on which devices, with which arguments: decided from facts, nothing is touched."""

from .arguments import whole_number
from .devices import gpus
from .facts import Assignment, Basis, Case, Device, Refused, narrowed
from .make import ON_GPUS, assign
from .placement import assignments
from .visibility import check_filters

__all__ = [
    "ON_GPUS",
    "Assignment",
    "Basis",
    "Case",
    "Device",
    "Refused",
    "assign",
    "assignments",
    "check_filters",
    "gpus",
    "narrowed",
    "whole_number",
]
