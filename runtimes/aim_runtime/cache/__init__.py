"""The model cache: models fetched once, verified, and kept on a volume."""
