"""The file of ``--models``: which models are served, under which names, and how.

version: 1
models:
- {name: chat, path: /models/llama, priority: high, replicas: 2, aliases: [gpt-4o]}
- {name: draft, path: /models/smollm2.gguf, engine: llama_cpp, max_model_len: 4096, options: {threads: 2}}
- {name: tuned, path: /models/tuned, engine: vllm, python: /opt/vllm/bin/python, load: on_demand}
- {name: assistant, variants: {chat: 90, tuned: 10}}
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import unquote, urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from aim_kserve.settings import served_name
from aim_profile.errors import AimProfileError
from aim_profile.files.place import MisplacedError, did_you_mean
from aim_profile.files.read import check_as, located, parsed, read_text
from aim_runtime.cache import AIM_CACHE
from aim_runtime.models.entry import Priority, VariantEntry
from aim_runtime.settings import ENGINES, RuntimeSettings


def _given(value: object) -> object:
    if value == "":
        raise ValueError("empty: give a path, or leave it out")
    return value


Name = Annotated[str, StringConstraints(pattern=r"^[^/\s]+(/[^/\s]+)*$", max_length=256), AfterValidator(served_name)]
File = Annotated[Path, BeforeValidator(_given)]
Whole = Annotated[int, Field(strict=True, ge=1)]
#: What a name with variants has, too; the rest only a model has.
_OF_A_NAME = ("name", "aliases", "variants")


class ModelsFileError(AimProfileError):
    """A models file that cannot be used. ``field`` is the path of the key: ``models[3].engine``."""


class ListedModel(BaseModel):
    """One served name: a model (``path``, ``uri``, or on another server), or a name whose requests other models share
    (``variants``).

    engine: as ``--engine``. python: the interpreter whose environment has the engine; ours by default. profile: as
    ``--profile``. load: ``on_demand`` is known and loaded when the repository API is asked to. options: the engine's
    own settings by the names of their flags. variants: served name → weight. priority: who makes way for whom, and
    the class of requests whose caller has none; latency_slo_ms: as ``--latency_slo_ms``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    name: Name
    path: File | None = None
    uri: str | None = None
    engine: str | None = None
    python: File | None = None
    profile: str | None = None
    aliases: tuple[Name, ...] = ()
    priority: Priority = "medium"
    latency_slo_ms: Annotated[float, Field(strict=True, gt=0, lt=math.inf)] | None = None
    replicas: Annotated[Whole, Field(le=1024)] = 1
    max_model_len: Whole | None = None
    max_concurrency: Whole | None = None
    load: Literal["at_start", "on_demand"] = "at_start"
    options: Mapping[str, Any] = Field(default_factory=dict)
    variants: Mapping[Name, Annotated[float, Field(strict=True, gt=0, lt=math.inf)]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _is_one_of_both(self) -> Self:
        if self.variants:
            given = next((name for name in ListedModel.model_fields if self._says_of_a_model(name)), None)
            if given is not None:
                raise MisplacedError((given,), "a name with variants is no model of its own: leave it out")
            return self
        elsewhere = "server_url" in self.options
        if (self.path is not None) + (self.uri is not None) + elsewhere != 1:
            raise ValueError("give path, or uri, or variants, or options.server_url: one of them")
        self._check_uri()
        return self

    def _says_of_a_model(self, name: str) -> bool:
        return name in self.model_fields_set and name not in _OF_A_NAME

    def _check_uri(self) -> None:
        if self.uri is None:
            return
        from aim_runtime.cache.errors import CacheError
        from aim_runtime.cache.uri import parse_uri

        try:
            parse_uri(self.uri)
        except CacheError as error:
            raise MisplacedError(("uri",), str(error)) from None

    def directory(self, cache: Path) -> Path | None:
        """Where the model lies, for a ``uri`` in ``cache``; None where another server has it.

        Raises:
            MisplacedError: it is not in the cache; nothing is downloaded.
        """
        if self.uri is None:
            return self.path
        parts = urlsplit(self.uri)
        if parts.scheme == "file":
            return Path(unquote(parts.path))
        from aim_runtime.cache.errors import CacheError
        from aim_runtime.cache.use import cached

        try:
            return cached(cache, self.uri)
        except (CacheError, OSError) as error:
            raise MisplacedError(("uri",), str(error)) from None


class ModelsFile(BaseModel):
    """All of them. Names and aliases are unique; variants name models of the same file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1]
    models: tuple[ListedModel, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_agree(self) -> Self:
        places: dict[str, int] = {}
        for at, model in enumerate(self.models):
            for name in (model.name, *model.aliases):
                first = places.setdefault(name, at)
                if first != at or (model.name, *model.aliases).count(name) > 1:
                    key = "name" if name == model.name else "aliases"
                    raise MisplacedError(("models", at, key), f"{name!r} names models[{first}] too: names are unique")
        return self

    @model_validator(mode="after")
    def _variants_are_models(self) -> Self:
        served = [model.name for model in self.models if not model.variants]
        if not served:
            raise MisplacedError(("models",), "all of them are names with variants: list the models, too")
        for at, model in enumerate(self.models):
            for name in model.variants:
                if name not in served:
                    problem = f"no model is named {name!r}; {did_you_mean(name, served)}"
                    raise MisplacedError(("models", at, "variants", name), problem)
        return self

    @property
    def served(self) -> list[ListedModel]:
        """The models themselves."""
        return [model for model in self.models if not model.variants]

    @property
    def variants(self) -> list[VariantEntry]:
        """The names with variants."""
        return [VariantEntry(model.name, model.variants, model.aliases) for model in self.models if model.variants]


def load_models(file: Path, base: RuntimeSettings) -> tuple[ModelsFile, list[RuntimeSettings]]:
    """The file, and the settings of each of its ``served`` models: ``base``, but for what the file says of it.

    Raises:
        ModelsFileError: ``file:LINE: models[1].options.thraeds: …``.
    """
    return parse_models(read_text(file, ModelsFileError), base, str(file))


def parse_models(text: str, base: RuntimeSettings, named: str) -> tuple[ModelsFile, list[RuntimeSettings]]:
    """The same from text; ``named`` stands in errors for the file."""
    source = parsed(text, named, ModelsFileError)
    listed = check_as(ModelsFile, source, ModelsFileError, "models file")
    settings = []
    for at, model in enumerate(listed.models):
        if not model.variants:
            try:
                settings.append(settings_of(base, model))
            except MisplacedError as problem:
                place = ("models", at, *problem.place)
                where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)[1:]
                line = located(named, source.text, place)
                raise ModelsFileError(f"{line}: {where}: {problem}", field=where) from problem
    return listed, settings


def settings_of(base: RuntimeSettings, model: ListedModel) -> RuntimeSettings:
    """``base`` as this model's own settings.

    Raises:
        MisplacedError: an option that no engine has, or that this engine does not take; a source that is not cached.
    """
    for name in model.options:
        if name not in ENGINES.fields:
            raise MisplacedError(("options", name), f"unknown option; {did_you_mean(name, ENGINES.fields)}")
    # Of the one model that flags name; of the server.
    others = {*ENGINES.fields, "model_id", "custom_model_name", "models", "placement", "eviction", "qos_priority"}
    shared = {name: getattr(base, name) for name in base.model_fields_set if name not in others}
    own = {
        "engine": model.engine,
        "profile": model.profile,
        "max_model_len": model.max_model_len,
        "max_concurrency": model.max_concurrency,
        "latency_slo_ms": model.latency_slo_ms,
        "model_dir": model.directory(base.cache_path or AIM_CACHE),
    }
    own = {name: value for name, value in own.items() if value is not None}
    said = {**shared, **own, "model_name": model.name, "qos_priority": model.priority, **model.options}
    try:
        return RuntimeSettings.model_validate(said)
    except ValidationError as problem:
        first = problem.errors(include_url=False)[0]
        of_all = next((name for name in own if f"--{name} " in first["msg"]), "engine")
        name = str(first["loc"][0]) if first["loc"] else of_all
        place = ("options", name) if name in model.options else (name,)
        raise MisplacedError(place, first["msg"].removeprefix("Value error, ")) from problem
