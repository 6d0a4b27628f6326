"""Checkpoints: whole or not there, found again wherever a run died."""
