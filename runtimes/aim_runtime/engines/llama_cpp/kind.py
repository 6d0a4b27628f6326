"""llama.cpp's settings, and which models are its."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from aim_runtime.engines.adapters import ADAPTERS_SETTING, AdapterPaths
from aim_runtime.engines.base import Engine, EngineSpec
from aim_runtime.engines.kind import DETERMINISTIC, EngineKind, EngineSettings


class LlamaCppSettings(EngineSettings):
    max_waiting: int = Field(256, ge=0, description="requests that may wait for a slot; one more is a 503")
    stall_timeout: float = Field(
        60,
        gt=0,
        description="seconds without a step, while there is work, after which its process is started again (in the "
        "server's process: unhealthy)",
    )
    # GGML_MAX_N_THREADS: it ends the process beyond that.
    threads: int | None = Field(None, ge=1, le=512, description="compute threads; default: the CPUs we may use")
    kv_cache_memory_bytes: int = Field(
        512 * 2**20, ge=1, description="room for the cache that all requests share; never less than one sequence needs"
    )
    parked_memory_bytes: int | None = Field(
        None,
        ge=0,
        description="host memory for what requests had computed that made way for more urgent ones, beyond which it is "
        "computed again; default: kv_cache_memory_bytes",
    )
    adapters: AdapterPaths = Field(default_factory=dict, description=ADAPTERS_SETTING)
    deterministic: bool = Field(False, description=DETERMINISTIC)


def create(spec: EngineSpec, settings: LlamaCppSettings) -> Engine:
    from .engine import LlamaCppEngine

    return LlamaCppEngine(
        spec.model_dir,
        served_model_name=spec.served_model_name,
        max_model_len=spec.max_model_len,
        slots=spec.max_concurrency or 8,
        threads=settings.threads,
        max_waiting=settings.max_waiting,
        stall_timeout_s=settings.stall_timeout,
        kv_cache_memory_bytes=settings.kv_cache_memory_bytes,
        parked_memory_bytes=settings.parked_memory_bytes,
        adapters=settings.adapters,
        deterministic=settings.deterministic,
    )


def serves(model: Path) -> bool:
    return model.suffix == ".gguf" if model.is_file() else any(model.glob("*.gguf"))


KIND = EngineKind(
    LlamaCppSettings,
    create,
    serves,
    reads="*.gguf",
    module="llama_cpp",
    remedy="pip install 'aim-kserve[runtime,embedded]'",
)
