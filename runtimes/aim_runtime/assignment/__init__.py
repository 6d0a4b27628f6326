"""Which engine serves which model on which devices, with which arguments: decided from facts, nothing is touched."""

from .arguments import whole_number
from .devices import gpus
from .facts import Assignment, Basis, Case, Device, Refused
from .make import ON_GPUS, assign
from .visibility import check_filters

__all__ = [
    "ON_GPUS",
    "Assignment",
    "Basis",
    "Case",
    "Device",
    "Refused",
    "assign",
    "check_filters",
    "gpus",
    "whole_number",
]
