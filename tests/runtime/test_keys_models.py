"""Which models a caller may use, by the name it asks for: on every way into the directory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.testclient import TestClient

from aim_kserve.errors import Forbidden, NotFound, ServingError
from aim_kserve.identity import Caller, set_caller
from aim_runtime.admin_api import adapter_routes, migration_routes
from aim_runtime.engines.base import RequestContext
from aim_runtime.models.directory import Models
from aim_runtime.models.entry import Launch, ModelEntry, VariantEntry
from aim_runtime.models.registry import Registry, Repository
from aim_runtime.openai_api import model_routes
from fake_engine import FakeEngine


@contextlib.contextmanager
def as_caller(*patterns: str) -> Iterator[None]:
    set_caller(Caller("k", "t", frozenset(["infer", "admin"]), models=patterns))
    try:
        yield
    finally:
        set_caller(None)


def entry(name: str, **options: Any) -> ModelEntry:
    aliases, at_start = options.pop("aliases", ()), options.pop("at_start", True)
    return ModelEntry(name, (Launch(lambda: FakeEngine(name, **options)),), aliases=aliases, at_start=at_start)


@pytest.fixture
def told() -> list[dict[str, Any]]:
    return []


@pytest.fixture
async def models(told: list[dict[str, Any]]) -> Models:
    """``chat`` (also ``gpt``, with the adapter ``polite``), ``secret`` (also ``s``), ``later``, which is not loaded,
    and ``split`` (also ``ab``) over the first two."""
    directory = Models(
        [
            entry("chat", aliases=("gpt",), adapters=("polite",)),
            entry("secret", aliases=("s",)),
            entry("later", at_start=False),
        ],
        [VariantEntry("split", {"chat": 1.0, "secret": 1.0}, aliases=("ab",))],
        audit=lambda action, **fields: told.append({"action": action, **fields}),
        registry=CollectorRegistry(),
    )
    await directory.load_async()
    return directory


NAMES = ("chat", "gpt", "polite", "secret", "s", "split", "ab")


@pytest.mark.parametrize(
    ("patterns", "usable"),
    [
        (("*",), NAMES),
        (("chat",), ("chat", "gpt")),  # an alias is what it stands for
        (("gpt",), ("gpt",)),  # and gives nothing but itself
        (("polite",), ("polite",)),  # an adapter does not open its base
        (("secret",), ("secret", "s")),
        (("split",), ("split", "ab")),  # a name with variants does not open them by their own names
        (("ab",), ("ab",)),
        (("s*",), ("secret", "s", "split", "ab")),
        (("later", "nobody"), ()),
    ],
)
async def test_what_patterns_give(models: Models, patterns: tuple[str, ...], usable: tuple[str, ...]) -> None:
    with as_caller(*patterns):
        assert models.names == usable
        assert tuple(Registry(models).get_models()) == usable
        cards = orjson.loads((await endpoint(models, "/v1/models")(None)).body)
        assert tuple(card["id"] for card in cards["data"]) == usable
        for name in NAMES:
            with contextlib.nullcontext() if name in usable else pytest.raises(Forbidden):
                models.route({"model": name}, RequestContext("r", {}))
            with contextlib.nullcontext() if name in usable else pytest.raises(Forbidden):
                models.kserve_model(name)


def endpoint(models: Models, path: str) -> Any:
    return next(route.endpoint for route in model_routes(models) if route.path == path)  # type: ignore[attr-defined]


@given(
    patterns=st.lists(st.text("ab*?", min_size=1, max_size=3), min_size=1, max_size=3),
    aliases=st.lists(st.text("ab", min_size=1, max_size=3), max_size=3, unique=True),
)
def test_nothing_is_used_that_no_pattern_means(patterns: list[str], aliases: list[str]) -> None:
    from fnmatch import fnmatchcase

    directory = Models([entry("model-a", aliases=tuple(aliases)), entry("b-model")], registry=CollectorRegistry())

    def meant(name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    with as_caller(*patterns):
        expected = [alias for alias in ("model-a", *aliases) if meant(alias) or meant("model-a")]
        assert list(directory.names) == expected + (["b-model"] if meant("b-model") else [])


async def test_a_refusal_tells_neither_what_there_is_nor_whether(models: Models) -> None:
    with as_caller("chat", "x-*"):
        said = []
        for name in ("secret", "later", "nobody"):
            with pytest.raises(Forbidden) as caught:
                models.route({"model": name}, RequestContext("r", {}))
            said.append(caught.value.message.replace(name, "NAME"))
            assert (caught.value.status, caught.value.code, caught.value.param) == (403, "model_not_permitted", "model")
        assert set(said) == {"model 'NAME': this credential may not use it; it may use: chat, gpt"}
        for lost in ({"model": "x-1"}, {}):  # one that it may use, and there is none; none at all
            with pytest.raises(ServingError) as missing:
                models.route(lost, RequestContext("r", {}))
            assert missing.value.status in (400, 404)
            assert "secret" not in missing.value.message
            assert "chat, gpt" in missing.value.message


@pytest.mark.parametrize("body", [{}, {"model": "m"}, {"model": "alias"}, {"model": "polite"}, {"model": 1}])
async def test_of_a_single_model_every_spelling_is_closed(body: dict[str, Any]) -> None:
    """Also none, and what is no name, which the only model answers."""
    directory = Models([entry("m", aliases=("alias",), adapters=("polite",))], registry=CollectorRegistry())
    await directory.load_async()
    with as_caller("other"), pytest.raises(Forbidden):
        directory.route(body, RequestContext("r", {}))
    with as_caller("polit?", "x"):
        with pytest.raises(NotFound) as caught:
            await directory.route({"model": "x"}, RequestContext("r", {})).call(
                "chat/completions", {"model": "x", "messages": []}, RequestContext("r", {})
            )
        assert caught.value.message == "model 'x' does not exist; this server has: polite"


async def test_the_index_and_changes_of_a_model(models: Models, told: list[dict[str, Any]]) -> None:
    repository = Repository(models)
    told.clear()
    with as_caller("later", "split"):
        assert [row["name"] for row in await repository.index()] == ["later"]
        await repository.load("later")
        await repository.unload("later")
        for change in (repository.load, repository.unload):
            for name in ("secret", "nobody", "gpt"):
                with pytest.raises(Forbidden):
                    await change(name)
        with pytest.raises(Forbidden):
            await models.migrate("secret", Launch(lambda: FakeEngine("secret")))
        with pytest.raises(Forbidden):
            await models.load("x" * 5000)
    assert models.states()["secret"] == "ready"
    refused = [(line["action"], line["model"]) for line in told if line["outcome"] == "refused"]
    assert refused == [
        *[(verb, name) for verb in ("load", "unload") for name in ("secret", "nobody", "gpt")],
        ("migrate", "secret"),
        ("load", "x" * 200),
    ]


async def test_a_migration_is_refused_before_anything_is_looked_at(models: Models) -> None:
    def launch_at(*_: Any) -> Launch:
        raise AssertionError

    app = answering(Starlette(routes=migration_routes(models, launch_at)))
    with as_caller("chat"):
        answer = TestClient(app).post("/v2/repository/models/secret/migrate", json={"card": 0})
    assert answer.status_code == 403


def answering(app: Starlette) -> Starlette:
    async def answer(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ServingError)
        return JSONResponse(error.body(), status_code=error.status)

    app.add_exception_handler(ServingError, answer)
    return app


@pytest.mark.parametrize(
    ("patterns", "load", "unload"),
    [
        (("base", "mine*"), 200, 200),
        (("base",), 403, 403),  # not the adapter's name
        (("mine*",), 403, 403),  # not the model it would change
        (("other",), 403, 403),
    ],
)
def test_an_adapter_needs_its_own_name_and_its_models(patterns: tuple[str, ...], load: int, unload: int) -> None:
    done: list[str] = []

    class Takes:
        name = "fake"
        adapters = ("mine-1",)

        async def load_adapter(self, name: str, path: Path) -> None:
            done.append(name)

        async def unload_adapter(self, name: str) -> None:
            done.append(name)

    told: list[dict[str, Any]] = []
    metrics = SimpleNamespace(remove_adapter=lambda name: None)
    model = SimpleNamespace(
        name="base", names=("base", "mine-1"), runs_on=Takes(), refusal=lambda: None, metrics=metrics
    )
    routes = adapter_routes(
        lambda: [model],  # type: ignore[list-item]
        audit=lambda action, **fields: told.append({"action": action, **fields}),
    )
    client = TestClient(answering(Starlette(routes=routes)))
    with as_caller(*patterns):
        loaded = client.post("/v1/load_lora_adapter", json={"lora_name": "mine-2", "lora_path": "/x"})
        unloaded = client.post("/v1/unload_lora_adapter", json={"lora_name": "mine-1"})
    assert (loaded.status_code, unloaded.status_code) == (load, unload)
    assert done == (["mine-2", "mine-1"] if load == 200 else [])
    assert [line["outcome"] for line in told] == ["ok" if load == 200 else "refused"] * 2
