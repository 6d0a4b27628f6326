"""Detectors: one file per family, each finding what it knows and nothing else."""
