"""Families whose judge is a text classifier: from a directory, in ONNX Runtime, or behind an endpoint."""
