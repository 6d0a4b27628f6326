"""Settings from flags, environment and annotations, in one place and strictly.

A process declares one frozen pydantic model; each field is at once a flag (``--http_port``, KServe's spelling,
``--http-port`` works too), an environment variable (``AIM_HTTP_PORT``) and, where the field names one, a pod
annotation (``aim.amd.com/max-model-len``) read through the Downward API. Flags win over environment, environment
over annotations, annotations over defaults. An unknown flag, ``AIM_`` variable or ``aim.amd.com/`` annotation is
an error: a typo must never be a silent default.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Self, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from aim_kserve.client_address import Proxies
from aim_kserve.identity_settings import IdentitySettings
from aim_kserve.redacted import redacted

ENV_PREFIX = "AIM_"
ANNOTATION_PREFIX = "aim.amd.com/"
DEFAULT_ANNOTATIONS_FILE = Path("/etc/podinfo/annotations")

#: Every annotation of the house (docs/architecture.md). A process reads those it declares; the others belong to
#: another process of the same pod template and are left to it.
KNOWN_ANNOTATIONS = frozenset(
    {
        "compute-partition",
        "gpu-sharing",
        "guardrail-policy",
        "guardrails",
        "latency-slo-ms",
        "max-concurrency",
        "max-model-len",
        "memory-limit",
        "memory-partition",
        "metric",
        "partition-count",
        "partition-id",
        "precision",
        "profile",
        "qos-priority",
    }
)
#: ``AIM_`` variables that are not settings of a process: AIM's own images and our Makefile set them.
FOREIGN_ENV = frozenset({"AIM_BASE_IMAGE_REF", "AIM_EMBEDDED_MODEL"})
#: Kubernetes' service links: a Service called ``aim-x`` puts ``AIM_X_SERVICE_HOST``, ``AIM_X_PORT=tcp://…`` … into
#: every pod of its namespace (https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables).
_SERVICE_LINK = re.compile(r"\w+_SERVICE_(HOST|PORT(_\w+)?)|\w+_PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?")

#: https://fetch.spec.whatwg.org/#origin-header: what a browser sends, so a path or a trailing slash never matches.
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::\d{1,5})?")

S = TypeVar("S", bound="ServerSettings")


class SettingsError(Exception):
    """A setting is wrong. The message is one line a setting: source, name, value and what is allowed."""

    def __init__(self, message: str) -> None:
        super().__init__(redacted(message))


class Parser(argparse.ArgumentParser):
    """Tells no credential that was given for something else."""

    def error(self, message: str) -> NoReturn:
        super().error(redacted(message))


class ServerSettings(IdentitySettings):
    """What every process of ours accepts: KServe's flags by KServe's names.

    Flags that KServe's controller injects (``--model_name --http_port --workers --predictor_host``) are all
    here; those that change nothing in a single asyncio process are accepted and say so.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
    #: Of ``--help``, in this order: heading → the settings under it. A setting in none stands under its own ``group``
    #: (``json_schema_extra``), else under "server".
    HEADINGS: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    model_name: str = Field(
        "model", min_length=1, pattern=r"^[^/\s]+(/[^/\s]+)*$", description="name the model is served under"
    )
    host: str = Field("0.0.0.0", description="address to listen on, HTTP and gRPC")
    http_port: int = Field(8080, ge=0, le=65535, description="HTTP port; 0 picks a free one")
    grpc_port: int = Field(8081, ge=0, le=65535, description="gRPC port; 0 picks a free one")
    enable_grpc: bool = Field(True, description="serve the V2 protocol over gRPC")
    grace_period: float = Field(
        30, ge=0, description="seconds from SIGTERM to the end; requests in flight have all but the last 3"
    )
    timeout_keep_alive: int = Field(65, ge=1, description="seconds an idle kept-alive connection stays open")
    timeout_receive: float = Field(
        30, gt=0, description="seconds a request's head may take to arrive, and the longest pause in its body; then 408"
    )
    cors_origins: tuple[str, ...] = Field(
        (), description="origins whose web pages may call, comma-separated, or *; default: none"
    )
    trusted_proxies: tuple[str, ...] = Field(
        (),
        description="addresses and networks of proxies whose x-forwarded-for is believed, comma-separated",
    )
    max_body_mib: float = Field(32, gt=0, description="largest request body accepted, MiB")
    grpc_max_send_message_length: int = Field(8 * 1024 * 1024, ge=1, description="bytes")
    grpc_max_receive_message_length: int = Field(8 * 1024 * 1024, ge=1, description="bytes")
    access_log: bool = Field(True, description="one JSON line per request on stdout")
    ssl_certfile: Path | None = Field(None, description="serve HTTPS with this certificate (PEM)")
    ssl_keyfile: Path | None = Field(
        None, validate_default=True, description="private key of --ssl_certfile, where that file does not hold it (PEM)"
    )
    annotations_file: Path = Field(DEFAULT_ANNOTATIONS_FILE, description="pod annotations, Downward API format")
    workers: int = Field(
        1,
        ge=1,
        description="accepted for KServe's controller; one asyncio process serves, scale with replicas",
    )
    enable_latency_logging: bool = Field(True, description="accepted for KServe; latencies are in the access log")

    @field_validator("*", mode="before")
    @classmethod
    def _is_no_empty_path(cls, value: object, info: ValidationInfo) -> object:
        """``Path("")`` is the current directory, which nobody means. Fields that take nothing for their default say so
        themselves (``BeforeValidator``)."""
        field = cls.model_fields[str(info.field_name)]
        is_path = field.annotation in (Path, Path | None)
        if value == "" and is_path and not any(isinstance(item, BeforeValidator) for item in field.metadata):
            raise ValueError("empty: give a path, or leave it out")
        return value

    @field_validator("model_name")
    @classmethod
    def _is_a_served_name(cls, name: str) -> str:
        return served_name(name)

    @field_validator("cors_origins", "trusted_proxies", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(item.strip() for item in value.split(",") if item.strip()) if isinstance(value, str) else value

    @field_validator("trusted_proxies")
    @classmethod
    def _are_networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for each in value:
            try:
                Proxies([each])
            except ValueError as error:
                raise ValueError(f"{error}: give addresses or networks, 10.0.0.0/8") from None
        return value

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(f"{origin!r} is no origin: give scheme://host[:port] without a path, or *")
        return value

    @field_validator("ssl_certfile", "ssl_keyfile")
    @classmethod
    def _is_readable(cls, file: Path | None) -> Path | None:
        try:
            if file is not None:
                file.read_bytes()
        except OSError as error:
            raise ValueError(f"cannot be read ({error.strerror}): give a readable PEM file") from error
        return file

    @field_validator("ssl_keyfile")
    @classmethod
    def _is_a_pair(cls, key: Path | None, info: ValidationInfo) -> Path | None:
        certificate = info.data.get("ssl_certfile")
        if certificate is not None:
            _load_pair(certificate, key)
        elif key is not None and "ssl_certfile" in info.data:
            raise ValueError("a key without its certificate: give --ssl_certfile, too")
        return key

    @classmethod
    def load(cls, argv: Sequence[str], env: Mapping[str, str] = os.environ, *, prog: str, description: str) -> Self:
        """Read all sources and validate once.

        Raises:
            SettingsError: a source holds an unknown or wrong setting.
            SystemExit: ``--help`` (0) or an unknown flag (2), by argparse.
        """
        flags = _read_flags(cls, argv, prog, description)
        environment = _read_env(cls, env)
        file = flags.get("annotations_file", environment.get("annotations_file", DEFAULT_ANNOTATIONS_FILE))
        annotations = _read_annotations(cls, Path(file), required="annotations_file" in {**flags, **environment})
        try:
            return cls.model_validate({**annotations, **environment, **flags})
        except ValidationError as error:
            raise SettingsError(_explain(error, flags, environment, cls)) from error

    @classmethod
    def of_annotations(cls, annotations: Mapping[str, str]) -> Self:
        """What a pod with these annotations is told by them, all else by default: asked before there is a pod.

        Raises:
            SettingsError: as at the pod's start: an unknown annotation of ours, or a wrong value.
        """
        try:
            return cls.model_validate(_ours(cls, annotations.items()))
        except ValidationError as error:
            raise SettingsError(_explain(error, {}, {}, cls)) from error


def served_name(name: str) -> str:
    """The name, if it can stand in paths, headers and logs. Raises ValueError."""
    if not name.isprintable():
        raise ValueError("has a character that cannot be printed: leave it out")
    if {".", ".."} & set(name.split("/")):
        raise ValueError("has . or .. between slashes, which clients take out of a path: leave it out")
    return name


def _load_pair(certificate: Path, key: Path | None) -> None:
    """Raises ValueError: what uvicorn would fail on, after a model has been loaded."""
    import ssl  # 20 ms, and only few serve TLS themselves

    try:
        # An encrypted key would ask for its password on a terminal that is not there.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=lambda: "")
    except (ssl.SSLError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise ValueError(
            f"does not hold the unencrypted key of --ssl_certfile {certificate} ({reason}): give both as PEM"
        ) from error


def annotation_of(field: FieldInfo) -> str | None:
    """The annotation (without prefix) a field is also read from: ``Field(json_schema_extra={"annotation": …})``."""
    value = _extra(field, "annotation")
    return value if isinstance(value, str) else None


def heading_of(name: str, cls: type[ServerSettings]) -> str:
    """The heading of ``--help`` a setting stands under (``ServerSettings.HEADINGS``)."""
    listed = (heading for heading, names in cls.HEADINGS.items() if name in names)
    return next(listed, None) or _extra(cls.model_fields[name], "group") or "server"


def _extra(field: FieldInfo, key: str) -> Any:
    extra = field.json_schema_extra
    return extra.get(key) if isinstance(extra, dict) else None


def variables_of(name: str, field: FieldInfo) -> tuple[str, ...]:
    """The variables a field is read from: its own, then those it is also known by to others
    (``json_schema_extra={"env": ["AIM_PORT"]}``)."""
    return (f"{ENV_PREFIX}{name.upper()}", *(_extra(field, "env") or ()))


def _read_flags(cls: type[S], argv: Sequence[str], prog: str, description: str) -> dict[str, str]:
    parser = Parser(
        prog=prog,
        usage="%(prog)s [--SETTING VALUE ...]",  # all of them would be a page
        description=description,
        epilog="Flags may be written with dashes (--http-port). They win over variables,\nvariables over annotations.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    names = dict.fromkeys((*chain.from_iterable(cls.HEADINGS.values()), *cls.model_fields))
    headings = dict.fromkeys(heading_of(name, cls) for name in names)
    groups = {heading: parser.add_argument_group(heading) for heading in headings}
    for name in names:
        _add_flag(groups[heading_of(name, cls)].add_argument, name, cls.model_fields[name])
    return vars(parser.parse_args(argv))


def _add_flag(add: Callable[..., argparse.Action], name: str, field: FieldInfo) -> None:
    is_bool = field.annotation is bool
    shape: dict[str, Any] = {
        "dest": name,
        "default": argparse.SUPPRESS,
        "nargs": "?" if is_bool else None,
        "const": "true" if is_bool else None,
        "metavar": "BOOL" if is_bool else name.rsplit("_", 1)[-1].upper(),
    }
    add(*_short(field), f"--{name}", help=_help(name, field), **shape)
    if "_" in name:
        add(f"--{name.replace('_', '-')}", help=argparse.SUPPRESS, **shape)


def _short(field: FieldInfo) -> tuple[str, ...]:
    short = _extra(field, "short")
    return (short,) if isinstance(short, str) else ()


def _help(name: str, field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    default = "required; " if field.is_required() else "" if value in (None, "", [], {}, ()) else f"default: {value}; "
    annotation = annotation_of(field)
    also = f"; annotation {ANNOTATION_PREFIX}{annotation}" if annotation else ""
    variables = ", ".join(variables_of(name, field))
    return f"{field.description or ''} ({default}env {variables}{also})".replace("%", "%%")


def _read_env(cls: type[S], env: Mapping[str, str]) -> dict[str, str]:
    by_variable = {key: name for name, field in cls.model_fields.items() for key in variables_of(name, field)}
    ours = {key: value for key, value in env.items() if key.startswith(ENV_PREFIX) and not _is_foreign(key, value)}
    unknown = sorted(set(ours) - set(by_variable))
    if unknown:
        raise SettingsError(f"environment {unknown[0]}: unknown setting; known: {', '.join(sorted(by_variable))}")
    found: dict[str, str] = {}
    for key, name in by_variable.items():
        if not found.get(name):
            found |= {name: ours[key]} if key in ours else {}
        elif ours.get(key) and found[name] != ours[key]:  # templates leave variables empty
            first = next(known for known in by_variable if by_variable[known] == name and known in ours)
            raise SettingsError(
                f"environment {key}: {ours[key]!r} contradicts {first}: {found[name]!r}; set one of them"
            )
    return found


def _is_foreign(key: str, value: str) -> bool:
    is_service_link = _SERVICE_LINK.fullmatch(key) or re.match(r"(tcp|udp|sctp)://", value)
    return key in FOREIGN_ENV or is_service_link is not None


def _read_annotations(cls: type[S], file: Path, *, required: bool) -> dict[str, str]:
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        if required:
            raise SettingsError(f"annotations_file {file}: no such file") from None
        return {}
    except OSError as error:
        raise SettingsError(f"annotations_file {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"annotations_file {file}: not UTF-8 at byte {error.start}: give a UTF-8 file") from error
    return _ours(cls, parse_downward_api(text, file))


def _ours(cls: type[S], annotations: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Settings by name, of the annotations of this process. Raises SettingsError for one that is nobody's."""
    by_annotation = {annotation_of(field): name for name, field in cls.model_fields.items()}
    ours = {}
    for key, value in annotations:
        if not key.startswith(ANNOTATION_PREFIX):
            continue
        short = key.removeprefix(ANNOTATION_PREFIX)
        if short in by_annotation:
            ours[by_annotation[short]] = value
        elif short not in KNOWN_ANNOTATIONS:
            raise SettingsError(
                f"annotation {key}: unknown; known under {ANNOTATION_PREFIX}: {', '.join(sorted(KNOWN_ANNOTATIONS))}"
            )
    return ours


def parse_downward_api(text: str, file: Path) -> list[tuple[str, str]]:
    """``key="escaped value"`` lines as the kubelet writes them (pkg/fieldpath: ``fmt.Sprintf("%v=%q")``).

    Raises:
        SettingsError: a line is not of that form, naming file and line.
    """
    pairs = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        match = re.fullmatch(r'([^=\s]+)=(".*")', line.strip())
        try:
            if match is None:
                raise ValueError(line)
            # Go's %q escapes are JSON's but for \a, \v and \xNN, which Kubernetes' UTF-8 text never needs.
            pairs.append((match[1], json.loads(match[2])))
        except ValueError:
            raise SettingsError(f'{file} line {number}: not of the form key="value": {line[:80]!r}') from None
    return pairs


def _explain(error: ValidationError, flags: Mapping[str, Any], env: Mapping[str, Any], cls: type[S]) -> str:
    lines = []
    for item in error.errors(include_url=False):
        name = str(item["loc"][0]) if item["loc"] else ""
        if name in flags:
            where = f"--{name}"
        elif name in env:
            where = f"environment {' or '.join(variables_of(name, cls.model_fields[name]))}"
        elif name in cls.model_fields and annotation_of(cls.model_fields[name]) and item["type"] != "missing":
            where = f"annotation {ANNOTATION_PREFIX}{annotation_of(cls.model_fields[name])}"
        else:
            where = f"--{name}" if name else "settings"
        message = item["msg"].removeprefix("Value error, ")
        is_given = item["type"] != "missing" and name and item["input"] is not None
        lines.append(f"{where}: {message}" + (f" (got {item['input']!r})" if is_given else ""))
    return "\n".join(lines)
