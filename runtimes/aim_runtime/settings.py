"""What the runtime is told: flags, ``AIM_*`` variables and ``aim.amd.com/`` annotations (see aim_kserve.settings)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, ValidationError, create_model, field_validator, model_validator

from aim_runtime.device_settings import DeviceSettings
from aim_runtime.engines import registry
from aim_runtime.engines.base import ModelLoadError
from aim_runtime.engines.side_by_side import side_by_side

#: Of a setting: as if it were not there.
_UNSET: tuple[object, ...] = (None, [], {})


class _Shared(DeviceSettings):
    """Settings of ``python -m aim_runtime``: these, and those of every engine (``aim_runtime.engines``)."""

    HEADINGS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "the model": (
            *("model_name", "model_dir", "model_id", "cache_path", "custom_model_name", "model_uri", "fetch"),
            *("engine", "max_model_len", "max_concurrency", "strict_fields"),
        ),
        "several models": ("models", "placement", "eviction"),
        "service levels": ("qos", "qos_policy", "qos_priority", "latency_slo_ms"),
        "what is started": (
            *("dry_run", "output", "node", "profile", "profiles", "evidence", "allow_general_profile_fallback"),
            *("precision", "metric", "unsized", "termination_log"),
        ),
        "devices": (
            *("compute_partition", "memory_partition", "partition_id", "partition_count", "card", "memory_limit"),
            *("gpu_sharing", "gpu_model", "binding", "node_name"),
        ),
        "the engine's process": ("supervise", "start_timeout", "warm_up", "self_check"),
        "adapters loaded at run time": ("runtime_adapters", "adapter_dir"),
        "logs and traces": (
            *("access_log", "audit_log", "log_level", "log_level_root", "debug", "enable_latency_logging"),
            "otlp_endpoint",
        ),
    }

    model_dir: Path = Field(Path("/mnt/models"), description="directory (or .gguf file) the model is loaded from")
    models: Path | None = Field(
        None, description="file that lists several models to serve (docs/models.md); then --model_dir is not looked at"
    )
    placement: Path | None = Field(
        None, description="--models: plan (aim-profile plan) that says which model gets which devices"
    )
    eviction: Literal["never", "idle"] = Field(
        "never",
        description="--models: what becomes of a model that is loaded at run time and does not fit: never: it is "
        "refused; idle: it takes the place of idle ones of a lower priority",
    )
    engine: str = Field(
        "auto",
        description=f"auto, {', '.join(registry.BUILT_IN)} or an installed one; "
        "auto: a .gguf file is llama_cpp, safetensors are vllm",
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
        description="requests computed at once; default: 8 (llama_cpp), the engine's own (others)",
        json_schema_extra={"annotation": "max-concurrency"},
    )
    strict_fields: bool = Field(
        False, description="refuse unknown fields of a request body (400) instead of ignoring them with a header"
    )
    otlp_endpoint: str | None = Field(
        None,
        pattern=r"^https?://\S+$",
        description="collector that gets spans of requests by OTLP/HTTP, http://HOST:4318; "
        "default: what OTEL_EXPORTER_OTLP_ENDPOINT says, else none",
    )
    audit_log: Path | None = Field(
        None, description="file for the lines that say who loaded and unloaded what; default: stdout"
    )

    qos: bool = Field(False, description="requests take turns by class, tenant and deadline (docs/qos.md)")
    qos_policy: Path | None = Field(
        None, description="file with classes, tenants and limits; implies --qos; default: what docs/qos.md says"
    )
    qos_priority: Literal["low", "medium", "high"] = Field(
        "medium",
        description="class of requests whose caller has none; of several models, their priority in --models says it",
        json_schema_extra={"annotation": "qos-priority"},
    )
    latency_slo_ms: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="milliseconds within which requests of that class get their first token, or are refused at once; "
        "implies --qos",
        json_schema_extra={"annotation": "latency-slo-ms"},
    )

    supervise: Literal["auto", "always", "never"] = Field(
        "auto",
        description="run the engine in a process of its own, watched and started again (always) or in the server's "
        "(never); auto: always, except vllm, which computes in processes of its own anyway",
    )
    start_timeout: float = Field(
        1800, gt=0, description="seconds an engine in a process of its own may take to load its model"
    )
    runtime_adapters: bool = Field(
        False, description="serve POST /v1/load_lora_adapter and unload_lora_adapter (scope admin; to all without keys)"
    )
    adapter_dir: Path | None = Field(
        None, description="adapters loaded at run time must lie below it; default: anywhere"
    )

    @field_validator("engine")
    @classmethod
    def _is_an_engine(cls, name: str) -> str:
        if name != "auto":
            try:
                registry.kind(name)
            except ModelLoadError as error:
                raise ValueError(str(error)) from None
        return name

    @model_validator(mode="after")
    def _belong_to_several_models(self) -> RuntimeSettings:
        for name in ("placement", "eviction"):
            if self.models is None and getattr(self, name) not in (None, "never"):
                raise ValueError(f"--{name} is for several models: list them in a file (--models)")
        named = next((name for name in ENGINES.owners if name in self.model_fields_set), None)
        if self.models is not None and named is not None:
            raise ValueError(f"--{named} is one engine's: say in {self.models} which model it is for (options)")
        return self

    @property
    def takes_turns(self) -> bool:
        """Whether requests wait for their turn."""
        return self.qos or self.qos_policy is not None or self.latency_slo_ms is not None

    @model_validator(mode="after")
    def _says_whether(self) -> RuntimeSettings:
        if "qos" in self.model_fields_set and not self.qos:
            said = next((name for name in ("qos_policy", "latency_slo_ms") if getattr(self, name) is not None), None)
            if said is not None:
                raise ValueError(f"--{said} needs --qos: leave one of both out")
        return self

    @model_validator(mode="after")
    def _is_of_one_place(self) -> RuntimeSettings:
        if self.fetch and self.model_uri is None:
            raise ValueError("--fetch is for a model of a source: say which (--model_uri)")
        if self.model_uri is not None and "model_dir" in self.model_fields_set:
            raise ValueError("--model_uri and --model_dir both say where the model is: leave one of them out")
        if self.model_uri is not None and self.models is not None:
            raise ValueError(f"--model_uri is of one model: say in {self.models} where each lies (path, uri)")
        return self

    @model_validator(mode="after")
    def _belongs_to_the_engine(self) -> RuntimeSettings:
        """A setting that the chosen engine does not have must not be silently dropped."""
        if self.engine != "auto":
            self.refuse_for(self.engine)
        return self

    def refuse_for(self, engine: str) -> None:
        """Check that what is set for an engine is ``engine``'s (again, once ``auto`` has been decided).

        Raises:
            ValueError: names the setting and the engine it belongs to.
        """
        if engine in ENGINES.clashes:
            raise ValueError(ENGINES.clashes[engine])
        for name, owners in ENGINES.owners.items():
            if engine not in owners and name in self.model_fields_set and getattr(self, name) not in _UNSET:
                others = f" (or choose {', '.join(owners[1:])}, to which it belongs, too)" if owners[1:] else ""
                raise ValueError(f"--{name} belongs to the {owners[0]} engine; this is {engine}: leave it out{others}")
        try:
            registry.kind(engine).settings.model_validate(self.engine_options(engine))
        except ValidationError as error:  # a rule over several settings: each of them has been looked at already
            raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None

    def engine_options(self, engine: str) -> dict[str, Any]:
        """What is set of the engine's own settings (``EngineSpec.options``)."""
        own = registry.kind(engine).settings.model_fields
        given = {name: getattr(self, name) for name in own if name in self.model_fields_set}
        return {name: value for name, value in given.items() if value not in _UNSET}


ENGINES = side_by_side(registry.kinds(), taken=_Shared)

if TYPE_CHECKING:
    RuntimeSettings = _Shared
else:
    RuntimeSettings = create_model(
        "RuntimeSettings", __base__=_Shared, __module__=__name__, __doc__=_Shared.__doc__, **ENGINES.fields
    )
