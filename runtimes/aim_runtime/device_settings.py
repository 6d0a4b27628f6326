"""Settings that decide which devices a model gets and how it is started there: flags, ``AIM_*``, annotations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from aim_kserve.log import NOISY
from aim_kserve.settings import ServerSettings
from aim_profile.errors import AimProfileError
from aim_profile.gpus.modes import Compute, Memory
from aim_profile.serving.profile import AimPrecision, Metric
from aim_profile.units import parse_memory


def _upper(value: object) -> object:
    """Modes are written in either case: the device plugin's resources are lower case, sysfs is upper."""
    return (value.strip().upper() or None) if isinstance(value, str) else value


def _lower(value: object) -> object:
    """``auto`` and nothing mean: not asked for. Templates of pods leave variables empty."""
    if not isinstance(value, str):
        return value
    text = value.strip().lower()
    return None if text in ("", "auto") else text


def _memory_bytes(value: object) -> object:
    """``40GB``, ``40GiB`` → bytes."""
    if not isinstance(value, str) or not value.strip():
        return value or None
    try:
        return parse_memory(value, field="memory-limit")
    except AimProfileError as error:
        raise ValueError(f"{error.problem.removeprefix('memory-limit: ')}; {error.remedy}") from None


def _none_if_empty(value: object) -> object:
    return None if isinstance(value, str) and not value.strip() else value


def _or_auto(value: object) -> object:
    """As it is written; nothing, ``auto`` and AIM's ``NONE`` are not asked for."""
    return None if _lower(value) in (None, "none") else value


def _level(value: object) -> object:
    return value.strip().upper() or None if isinstance(value, str) else value


def _is_said(value: object) -> object:
    """Nothing is the default, as AIM reads its variables."""
    return True if isinstance(value, str) and not value.strip() else value


#: Where Kubernetes looks, unless the container says otherwise (terminationMessagePath).
TERMINATION_LOG = Path("/dev/termination-log")
LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]


def _annotated(name: str) -> dict[str, Any]:
    return {"annotation": name}


class DeviceSettings(ServerSettings):
    """What a runtime is told about devices, besides the model itself."""

    compute_partition: Annotated[Compute | None, BeforeValidator(_upper)] = Field(
        None,
        description="mode the card must be in: SPX, DPX, TPX, QPX or CPX",
        json_schema_extra=_annotated("compute-partition"),
    )
    memory_partition: Annotated[Memory | None, BeforeValidator(_upper)] = Field(
        None,
        description="memory mode the card must be in: NPS1, NPS2, NPS4",
        json_schema_extra=_annotated("memory-partition"),
    )
    partition_id: Annotated[int | None, BeforeValidator(_none_if_empty)] = Field(
        None,
        ge=0,
        description="partition of the card to use; in a pod the device plugin chooses",
        json_schema_extra=_annotated("partition-id"),
    )
    partition_count: Annotated[int | None, BeforeValidator(_or_auto)] = Field(
        None,
        ge=1,
        le=64,
        description="devices the model is split over, side by side; in a pod exactly so many must be here",
        json_schema_extra={**_annotated("partition-count"), "env": ["AIM_GPU_COUNT"]},
    )
    card: int | None = Field(None, ge=0, description="card to use on bare metal; default: the first that fits")
    memory_limit: Annotated[int | None, BeforeValidator(_memory_bytes)] = Field(
        None,
        ge=1,
        description="most memory to take of a device, as in 40GB or 40GiB; default: 90 % of it",
        json_schema_extra=_annotated("memory-limit"),
    )
    gpu_sharing: Annotated[Literal["enabled", "disabled"] | None, BeforeValidator(_lower)] = Field(
        None,
        description="enabled: only a part of a card may be taken; disabled: only whole cards",
        json_schema_extra=_annotated("gpu-sharing"),
    )
    precision: Annotated[AimPrecision | None, BeforeValidator(_lower)] = Field(
        None, description="of the weights; auto: the files' own", json_schema_extra=_annotated("precision")
    )
    metric: Annotated[Metric | None, BeforeValidator(_lower)] = Field(
        None,
        description="latency or throughput, what the engine's arguments favour; default: latency",
        json_schema_extra=_annotated("metric"),
    )
    profile: Annotated[str | None, BeforeValidator(_none_if_empty)] = Field(
        None,
        description="profile to serve with: a file, MODEL/PROFILE-ID, or a profile id; default: derived from the model",
        json_schema_extra={**_annotated("profile"), "env": ["AIM_PROFILE_ID"]},
    )
    profiles: Path | None = Field(None, description="directory of profiles to select from, laid out as AIM's")
    evidence: Path | None = Field(
        None,
        description="what aim-runtime measure wrote, a file or a directory to look in: a profile that it speaks for is "
        "measured; a file of other hardware is refused",
    )
    model_id: Annotated[str | None, BeforeValidator(_none_if_empty)] = Field(
        None,
        description="what the model is called where it was published, as in org/model: profiles are selected by it",
        json_schema_extra={"env": ["AIM_ID"]},
    )
    allow_general_profile_fallback: Annotated[bool, BeforeValidator(_is_said)] = Field(
        True, description="--profiles: also select general profiles"
    )
    unsized: Literal["refuse", "start"] = Field(
        "refuse", description="a model on GPUs of which too little is known to size it: refuse it, or start it"
    )
    gpu_model: Annotated[str | None, BeforeValidator(_or_auto)] = Field(
        None, description="GPU that must be here, as in MI300X; default: any of the catalogue"
    )
    cache_path: Annotated[Path | None, BeforeValidator(_none_if_empty)] = Field(
        None, description="where models lie by their id, as AIM's download-to-cache puts them: --model_id is looked for"
    )
    model_uri: Annotated[str | None, BeforeValidator(_none_if_empty)] = Field(
        None,
        description="source of a model in the cache (--cache_path; docs/cache.md), instead of --model_dir: a path, "
        "http(s)://, s3://, hf://ORG/NAME or oci://",
    )
    fetch: bool = Field(False, description="--model_uri: fetch it where the cache does not have it, before the start")
    custom_model_name: Annotated[str | None, BeforeValidator(_none_if_empty)] = Field(
        None, description="--cache_path: the model's directory below it, where it is not its id"
    )
    http_port: int = Field(
        8080, ge=0, le=65535, description="HTTP port; 0 picks a free one", json_schema_extra={"env": ["AIM_PORT"]}
    )
    log_level: Annotated[LogLevel | None, BeforeValidator(_level)] = Field(
        None, description="of the runtime's own log; default: INFO"
    )
    log_level_root: Annotated[LogLevel | None, BeforeValidator(_level)] = Field(
        None, description="of every other logger in the process; default: INFO, WARNING for KServe and uvicorn"
    )
    debug: bool = Field(False, description="as --log_level=DEBUG")
    binding: Literal["auto", "pod", "bare-metal"] = Field(
        "auto",
        description="pod: the device plugin has chosen, use what is here; bare-metal: choose by card and partition; "
        "auto: pod where KUBERNETES_SERVICE_HOST is set",
    )
    node: Path | None = Field(
        None, description="emulation file to read instead of this machine (aim-profile node export)"
    )
    warm_up: bool = Field(True, description="one short request through the engine before it is ready")
    self_check: Literal["auto", "always", "never"] = Field(
        "auto",
        description="refuse readiness where a known sentence is not likely or a greedy text is none; "
        "auto: with tensor parallelism over partitions",
    )
    node_name: Annotated[str | None, BeforeValidator(_none_if_empty)] = Field(
        None, description="this node's name in a plan; default: its host name. In a pod: spec.nodeName"
    )
    dry_run: bool = Field(False, description="print what would be started, and start nothing")
    output: Literal["text", "json"] = Field(
        "text", description="form of --dry_run: text or json", json_schema_extra={"short": "-o"}
    )
    termination_log: Path = Field(
        TERMINATION_LOG, description="where the reason of a refused start is written, if it can be"
    )

    @property
    def log_levels(self) -> dict[str, str]:
        """Logger ("": the root) → its level, where one is said: for this process and the engine's."""
        ours = self.log_level or ("DEBUG" if self.debug else None)
        others = dict.fromkeys(("", *NOISY), self.log_level_root) if self.log_level_root else {}
        return {**others, "aim": ours} if ours else {**others}
