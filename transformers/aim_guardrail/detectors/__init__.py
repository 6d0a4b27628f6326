"""Detectors: one file or folder per family, each finding what it knows and nothing else."""
