"""vLLM's settings, and which models are its."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from aim_runtime.engines.adapters import ADAPTERS_SETTING, AdapterPaths
from aim_runtime.engines.base import Engine, EngineSpec
from aim_runtime.engines.kind import DETERMINISTIC, EngineArgs, EngineKind, EngineSettings


class VllmSettings(EngineSettings):
    tensor_parallel_size: int | None = Field(None, ge=1, description="devices the model is split over")
    engine_args: EngineArgs = Field(
        default_factory=list, description="the engine's own flags, as a command line or a JSON object"
    )
    adapters: AdapterPaths = Field(default_factory=dict, description=ADAPTERS_SETTING)
    deterministic: bool = Field(False, description=DETERMINISTIC)


def create(spec: EngineSpec, settings: VllmSettings) -> Engine:
    from .engine import VllmEngine

    return VllmEngine(
        spec.model_dir,
        served_model_name=spec.served_model_name,
        max_model_len=spec.max_model_len,
        max_num_seqs=spec.max_concurrency,
        tensor_parallel_size=settings.tensor_parallel_size,
        engine_args=settings.engine_args,
        adapters=settings.adapters if "adapters" in settings.model_fields_set else None,
        deterministic=settings.deterministic,
    )


def serves(model: Path) -> bool:
    return (model / "config.json").is_file() and any(model.glob("*.safetensors"))


KIND = EngineKind(
    VllmSettings,
    create,
    serves,
    reads="config.json with *.safetensors",
    module="vllm",
    remedy="use the vLLM image, or pip install 'aim-kserve[runtime,vllm]' on a machine without GPU",
)
