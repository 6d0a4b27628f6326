"""Which engine serves the model that lies in a directory, and only that engine is imported."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from aim_kserve.errors import StartupError
from aim_runtime.engines import registry
from aim_runtime.engines.base import Engine, EngineSpec
from aim_runtime.settings import RuntimeSettings

#: Engine → the module its library installs, and how to get it.
LIBRARIES = {
    "llama_cpp": ("llama_cpp", "pip install 'aim-kserve[runtime,embedded]'"),
    "vllm": ("vllm", "use the vLLM image, or pip install 'aim-kserve[runtime,vllm]' on a machine without GPU"),
}


def create_engine(settings: RuntimeSettings) -> Engine:
    """The engine for ``settings``, not loaded yet.

    Raises:
        StartupError: no model of a known format, the engine is not installed, or a setting belongs to the other one.
    """
    name = settings.engine if settings.engine != "auto" else detect(settings.model_dir)
    try:
        settings.refuse_for(name)
    except ValueError as error:
        raise StartupError(str(error)) from None
    module, remedy = LIBRARIES[name]
    if importlib.util.find_spec(module) is None:
        raise StartupError(f"the {name} engine is not installed in this environment: {remedy}")
    spec = EngineSpec(
        name,
        settings.model_dir,
        settings.model_name,
        settings.max_model_len,
        settings.max_concurrency,
        _options(settings, name),
    )
    return registry.create(spec)


def _options(settings: RuntimeSettings, engine: str) -> dict[str, Any]:
    if engine == "vllm":
        return {"tensor_parallel_size": settings.tensor_parallel_size, "engine_args": settings.engine_args}
    return {
        "threads": settings.threads,
        "max_waiting": settings.max_waiting,
        "stall_timeout_s": settings.stall_timeout,
    }


def detect(model_dir: Path) -> str:
    """``llama_cpp`` for GGUF, ``vllm`` for a Hugging Face directory with safetensors.

    Raises:
        StartupError: nothing, or both; says what was looked for and where.
    """
    if not model_dir.exists():
        raise StartupError(f"--model_dir {model_dir}: no such file or directory")
    if model_dir.is_file():
        if model_dir.suffix == ".gguf":
            return "llama_cpp"
        raise StartupError(f"--model_dir {model_dir}: not a .gguf file (and a safetensors model is a directory)")
    gguf = any(model_dir.glob("*.gguf"))
    safetensors = (model_dir / "config.json").is_file() and any(model_dir.glob("*.safetensors"))
    if gguf and safetensors:
        raise StartupError(f"--model_dir {model_dir} holds a .gguf file and safetensors: choose with --engine")
    if gguf or safetensors:
        return "llama_cpp" if gguf else "vllm"
    raise StartupError(
        f"--model_dir {model_dir}: found neither *.gguf (for llama_cpp) nor config.json with *.safetensors (for vllm)"
    )
