"""Trials over any number of a job: which values are best, at what cost."""
