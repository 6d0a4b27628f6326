"""Accelerators and the partition modes each one has."""
