"""The partition-aware predictor runtime: a request becomes tokens."""
