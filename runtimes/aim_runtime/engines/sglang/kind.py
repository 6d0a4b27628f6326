"""SGLang's settings, and the command that starts its server.

Flags by https://docs.sglang.io/docs/advanced_features/server_arguments (0.5). SGLang is not installed where this
runtime is tested: it runs there against a double that answers in SGLang's recorded formats (docs/engines.md).
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from pydantic import Field

from aim_runtime.engines.base import Engine, EngineSpec, ModelLoadError
from aim_runtime.engines.kind import EngineArgs, EngineKind, command_line
from aim_runtime.engines.openai_server.kind import ServerAnswers, free_port

#: Flags that this runtime gives: given twice, SGLang's last one would win.
OURS = frozenset(
    (
        "model-path",
        "model",
        "served-model-name",
        "host",
        "port",
        "context-length",
        "max-running-requests",
        "tensor-parallel-size",
        "tp-size",
        "tp",
        "mem-fraction-static",
        "enable-metrics",
        "api-key",
    )
)
_REMEDY = "use an image with SGLang, or name its interpreter with --sglang_python"


class SglangSettings(ServerAnswers):
    tensor_parallel_size: int | None = Field(None, ge=1, description="devices the model is split over")
    engine_args: EngineArgs = Field(
        default_factory=list, description="the engine's own flags, as a command line or a JSON object"
    )
    mem_fraction_static: float | None = Field(
        None, gt=0, lt=1, description="share of a device's memory for weights and KV cache; default: SGLang's own"
    )
    sglang_python: Path | None = Field(
        None, description="the Python interpreter that SGLang is installed for; default: the one that runs this"
    )


def create(spec: EngineSpec, settings: SglangSettings) -> Engine:
    """Raises:
    ModelLoadError: SGLang is not installed, or a flag of ``engine_args`` is one of ours.
    """
    from aim_runtime.engines.openai_server.engine import OpenAIServerEngine
    from aim_runtime.engines.openai_server.process import ServerProcess

    if settings.sglang_python is None and importlib.util.find_spec("sglang") is None:
        raise ModelLoadError(f"the sglang engine is not installed in this environment: {_REMEDY}")
    port = free_port()
    return OpenAIServerEngine(
        f"http://127.0.0.1:{port}",
        served_model_name=spec.served_model_name,
        model=spec.served_model_name,
        max_model_len=spec.max_model_len,
        most=spec.max_concurrency,
        max_waiting=settings.max_waiting,
        silence_timeout_s=settings.server_timeout,
        start_timeout_s=settings.server_start_timeout,
        process=ServerProcess(server_command(spec, settings, port)),
        name="sglang",
    )


def server_command(spec: EngineSpec, settings: SglangSettings, port: int) -> list[str]:
    """``python -m sglang.launch_server …``. Raises ModelLoadError: a flag that is not ``engine_args``' to set."""
    more = command_line(settings.engine_args)
    for word in more:
        flag = word.partition("=")[0].removeprefix("--").replace("_", "-")
        if word.startswith("--") and flag in OURS:
            raise ModelLoadError(f"--engine_args: --{flag} is for this runtime to give to SGLang: leave it out")
    ours = {
        "model-path": spec.model_dir,
        "served-model-name": spec.served_model_name,
        "host": "127.0.0.1",
        "port": port,
        "context-length": spec.max_model_len,
        "max-running-requests": spec.max_concurrency,
        "tp-size": settings.tensor_parallel_size,
        "mem-fraction-static": settings.mem_fraction_static,
    }
    flags = [word for name, value in ours.items() if value is not None for word in (f"--{name}", str(value))]
    python = str(settings.sglang_python or sys.executable)
    return [python, "-m", "sglang.launch_server", *flags, "--enable-metrics", *more]


#: ``auto`` never chooses it: vLLM serves the same directories, and which of them is faster is a profile's to say.
KIND = EngineKind(SglangSettings, create)
