"""What the runtime is told: flags, ``AIM_*`` variables and ``aim.amd.com/`` annotations (see aim_kserve.settings)."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

import orjson
from pydantic import BeforeValidator, Field, model_validator

from aim_kserve.settings import ServerSettings


def _engine_args(value: object) -> object:
    """A JSON object as a mapping, anything else as a command line."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    try:
        return orjson.loads(text) if text.startswith("{") else shlex.split(text)
    except ValueError as error:
        raise ValueError(f"neither a JSON object nor a command line: {error}") from None


class RuntimeSettings(ServerSettings):
    """Settings of ``python -m aim_runtime``."""

    model_dir: Path = Field(Path("/mnt/models"), description="directory (or .gguf file) the model is loaded from")
    engine: Literal["auto", "llama_cpp", "vllm"] = Field(
        "auto", description="auto, llama_cpp or vllm; auto: a .gguf file is llama_cpp, safetensors are vllm"
    )
    max_model_len: int | None = Field(
        None,
        ge=1,
        description="longest prompt plus answer, tokens; default: what the model says",
        json_schema_extra={"annotation": "max-model-len"},
    )
    max_concurrency: int | None = Field(
        None,
        ge=1,
        description="requests computed at once; default: 8 (llama_cpp), vLLM's own (vllm)",
        json_schema_extra={"annotation": "max-concurrency"},
    )
    max_waiting: int = Field(256, ge=0, description="llama_cpp: requests that may wait for a slot; one more is a 503")
    stall_timeout: float = Field(
        60, gt=0, description="llama_cpp: seconds without a step, while there is work, that make the engine unhealthy"
    )
    threads: int | None = Field(None, ge=1, description="llama_cpp: compute threads; default: the CPUs we may use")
    tensor_parallel_size: int | None = Field(None, ge=1, description="vllm: devices the model is split over")
    strict_fields: bool = Field(
        False, description="refuse unknown fields of a request body (400) instead of ignoring them with a header"
    )
    engine_args: Annotated[list[str] | dict[str, Any], BeforeValidator(_engine_args)] = Field(
        default_factory=list, description="vllm: its own flags, as a command line or a JSON object"
    )

    @model_validator(mode="after")
    def _belongs_to_the_engine(self) -> RuntimeSettings:
        """A setting that the chosen engine does not have must not be silently dropped."""
        if self.engine == "llama_cpp":
            self.refuse_for("llama_cpp")
        elif self.engine == "vllm":
            self.refuse_for("vllm")
        return self

    def refuse_for(self, engine: str) -> None:
        """Check that nothing is set which ``engine`` does not have (again, once ``auto`` has been decided).

        Raises:
            ValueError: names the setting and the engine it belongs to.
        """
        owners = {
            "max_waiting": "llama_cpp",
            "stall_timeout": "llama_cpp",
            "threads": "llama_cpp",
            "tensor_parallel_size": "vllm",
        }
        for name, owner in {**owners, "engine_args": "vllm"}.items():
            if owner != engine and name in self.model_fields_set and getattr(self, name) not in (None, [], {}):
                raise ValueError(f"--{name} belongs to the {owner} engine; this is {engine}: leave it out")
