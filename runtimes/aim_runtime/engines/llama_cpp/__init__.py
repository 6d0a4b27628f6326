"""The embedded engine: llama.cpp in this process, one thread and one context for all sequences."""
