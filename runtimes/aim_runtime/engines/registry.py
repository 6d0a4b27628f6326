"""Engines by name. Only the one that is asked for is imported."""

from __future__ import annotations

from .base import Engine, EngineSpec

NAMES = ("llama_cpp", "vllm")


def create(spec: EngineSpec) -> Engine:
    """The engine that ``spec`` names, not loaded yet.

    Raises:
        KeyError: no engine of that name.
        TypeError: an option that the engine does not have.
    """
    return {"llama_cpp": _llama_cpp, "vllm": _vllm}[spec.engine](spec)


def _llama_cpp(spec: EngineSpec) -> Engine:
    from .llama_cpp.engine import LlamaCppEngine

    return LlamaCppEngine(
        spec.model_dir,
        served_model_name=spec.served_model_name,
        max_model_len=spec.max_model_len,
        slots=spec.max_concurrency or 8,
        **spec.options,
    )


def _vllm(spec: EngineSpec) -> Engine:
    from .vllm.engine import VllmEngine

    return VllmEngine(
        spec.model_dir,
        served_model_name=spec.served_model_name,
        max_model_len=spec.max_model_len,
        max_num_seqs=spec.max_concurrency,
        **spec.options,
    )
