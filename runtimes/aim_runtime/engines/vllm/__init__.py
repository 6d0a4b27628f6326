"""vLLM as an engine; the library itself is imported by its own modules only."""
