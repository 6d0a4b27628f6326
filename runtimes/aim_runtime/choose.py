"""Which engine serves the model that lies in a directory, and only that engine is imported."""

from __future__ import annotations

from pathlib import Path

from aim_kserve.errors import StartupError
from aim_runtime.engines import registry
from aim_runtime.engines.base import Engine, EngineSpec, ModelLoadError
from aim_runtime.settings import RuntimeSettings


def create_engine(settings: RuntimeSettings) -> Engine:
    """The engine for ``settings``, not loaded yet.

    Raises:
        StartupError: no model of a known format, the engine is not installed, or a setting belongs to another one.
    """
    name = settings.engine if settings.engine != "auto" else detect(settings.model_dir)
    try:
        settings.refuse_for(name)
        spec = EngineSpec(
            name,
            settings.model_dir,
            settings.model_name,
            settings.max_model_len,
            settings.max_concurrency,
            settings.engine_options(name),
        )
        return registry.create(spec)
    except (ModelLoadError, ValueError) as error:
        raise StartupError(str(error)) from None


def detect(model_dir: Path) -> str:
    """The one engine that serves what lies there: ``llama_cpp`` for GGUF, ``vllm`` for a Hugging Face directory with
    safetensors.

    Raises:
        StartupError: none does, or more than one; says what was looked for and where.
    """
    if not model_dir.exists():
        raise StartupError(f"--model_dir {model_dir}: no such file or directory")
    able = registry.serving(model_dir)
    if len(able) == 1:
        return able[0]
    kinds = registry.kinds()
    if able:
        held = " and ".join(f"{kinds[name].reads} ({name})" for name in able)
        raise StartupError(f"--model_dir {model_dir} holds {held}: choose with --engine")
    if model_dir.is_file():
        raise StartupError(f"--model_dir {model_dir}: not a .gguf file (and a safetensors model is a directory)")
    looked_for = " nor ".join(f"{kind.reads} (for {name})" for name, kind in kinds.items() if kind.reads)
    raise StartupError(f"--model_dir {model_dir}: found neither {looked_for}")
