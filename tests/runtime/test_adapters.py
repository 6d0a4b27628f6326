"""LoRA adapters are models of their own to a client: listed, retrieved, asked for by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from pydantic import TypeAdapter, ValidationError
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.testclient import TestClient

from aim_kserve.errors import ServingError
from aim_runtime.admin_api import adapter_routes
from aim_runtime.engines.adapters import AdapterPaths
from lora_files import weights, write_gguf
from served import Served


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    with (
        Served.fake(adapters=["lora-a", "lora-b"]) as served,
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def test_adapters_are_listed_with_their_parent(client: openai.OpenAI) -> None:
    cards = [card.model_dump() for card in client.models.list()]
    assert [(card["id"], card.get("parent")) for card in cards] == [("m", None), ("lora-a", "m"), ("lora-b", "m")]
    assert client.models.retrieve("lora-b").id == "lora-b"


def test_an_adapter_is_asked_by_name(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="lora-a", messages=[{"role": "user", "content": "Hi"}], max_tokens=2, extra_body={}
    )
    assert answer.choices[0].message.content


def test_an_unknown_name_is_told_all_known_ones(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="m, lora-a, lora-b"):
        client.completions.create(model="lora-c", prompt="x")


# --- loaded and unloaded while it serves ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("adapters")
    return {name: write_gguf(directory / f"{name}.gguf", weights(seed)) for seed, name in enumerate("abc", start=1)}


@pytest.fixture(scope="module")
def serving(embedded_model: Path, adapters: dict[str, Path]) -> Iterator[Served]:
    """The embedded model as ``smollm2`` with adapter ``a``, and run-time adapters allowed."""
    flags = {
        "model_name": "smollm2",
        "model_dir": embedded_model,
        "threads": 1,
        "max_model_len": 512,
        "adapters": f"a={adapters['a']}",
        "deterministic": "true",  # texts are compared, with and without a known prefix
        "runtime_adapters": "true",
        "adapter_dir": adapters["a"].parent,
    }
    with Served(["-m", "aim_runtime", *(f"--{name}={value}" for name, value in flags.items())]) as server:
        yield server


def load(served: Served, name: str, path: object, **fields: object) -> httpx.Response:
    body = {"lora_name": name, "lora_path": str(path), **fields}
    return httpx.post(f"{served.url}/v1/load_lora_adapter", json=body, timeout=30)


def unload(served: Served, name: str) -> httpx.Response:
    return httpx.post(f"{served.url}/v1/unload_lora_adapter", json={"lora_name": name}, timeout=30)


def answer(served: Served, model: str) -> httpx.Response:
    body = {"model": model, "prompt": "The old sailor told us:", "max_tokens": 12, "temperature": 0}
    return httpx.post(f"{served.url}/v1/completions", json=body, timeout=30)


def cards(served: Served) -> dict[str, dict[str, object]]:
    return {card["id"]: card for card in httpx.get(f"{served.url}/v1/models").json()["data"]}


@pytest.mark.model
def test_an_adapter_comes_and_goes_as_a_model(serving: Served, adapters: dict[str, Path]) -> None:
    assert list(cards(serving)) == ["smollm2", "a"]
    loaded = load(serving, "b", adapters["b"])
    assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'b' added successfully.")
    assert {key: cards(serving)["b"][key] for key in ("parent", "root")} == {"parent": "smollm2", "root": "smollm2"}
    told = {model: answer(serving, model).json() for model in ("smollm2", "a", "b")}
    assert [told[model]["model"] for model in told] == ["smollm2", "a", "b"]
    assert len({each["choices"][0]["text"] for each in told.values()}) == 3
    v1 = httpx.post(f"{serving.url}/v1/models/b:predict", json={"instances": ["Hi"]}, timeout=30)
    assert v1.status_code == 200, v1.text
    gone = unload(serving, "b")
    assert (gone.status_code, gone.text) == (200, "Success: LoRA adapter 'b' removed successfully.")
    after = answer(serving, "b")
    assert (after.status_code, after.json()["error"]["code"]) == (404, "model_not_found")
    assert list(cards(serving)) == ["smollm2", "a"]


def test_every_action_is_told_to_the_audit_trail() -> None:
    told: list[dict[str, Any]] = []
    engine = SimpleNamespace(name="fake", adapters=())
    models = [SimpleNamespace(name="m", names=("m",), runs_on=engine, refusal=lambda: None)]
    routes = adapter_routes(
        lambda: models,  # type: ignore[arg-type, return-value]
        audit=lambda action, **fields: told.append({"action": action, **fields}),
    )
    client = TestClient(Starlette(routes=routes), raise_server_exceptions=False)
    client.post("/v1/load_lora_adapter", json={"lora_name": "m", "lora_path": "/x"})
    client.post("/v1/unload_lora_adapter", json={"lora_name": "x"})
    assert [(line["action"], line["model"], line["adapter"], line["outcome"]) for line in told] == [
        ("load_adapter", "m", "m", "refused"),
        ("unload_adapter", "m", "x", "refused"),
    ]
    assert "'x' is not loaded" in told[1]["reason"]


def test_of_several_models_one_must_be_named(tmp_path: Path) -> None:
    taken: list[tuple[str, str, Path]] = []

    class Takes:
        adapters = ("one",)

        def __init__(self, name: str) -> None:
            self.name = name

        async def load_adapter(self, name: str, path: Path) -> None:
            taken.append((self.name, name, path))

        async def unload_adapter(self, name: str) -> None: ...

    models = [SimpleNamespace(name=n, names=(n, "one"), runs_on=Takes(n), refusal=lambda: None) for n in ("m", "n")]
    app = Starlette(
        routes=adapter_routes(lambda: models, audit=lambda action, **_: None),  # type: ignore[arg-type, return-value]
        exception_handlers={ServingError: lambda _, error: JSONResponse(error.body(), error.status)},
    )
    client = TestClient(app)

    def load(**fields: object) -> httpx.Response:
        return client.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "/x", **fields})

    refused = load().json()["error"]
    assert refused["message"] == "base_model_name: missing; the models served are: m, n"
    assert load(base_model_name="n").status_code == 200
    assert taken == [("n", "x", Path("/x"))]
    other = load(base_model_name="n", lora_name="m", load_inplace=True)  # another model's name
    assert other.json()["error"]["code"] == "adapter_name_taken"


@pytest.mark.model
def test_new_weights_take_an_adapters_place_only_when_told_to(serving: Served, adapters: dict[str, Path]) -> None:
    first = answer(serving, "a").json()["choices"][0]["text"]
    taken = load(serving, "a", adapters["c"])
    assert (taken.status_code, taken.json()["error"]["code"]) == (400, "adapter_name_taken")
    assert "load_inplace" in taken.json()["error"]["message"]
    assert answer(serving, "a").json()["choices"][0]["text"] == first
    assert load(serving, "a", adapters["c"], load_inplace=True).status_code == 200
    assert answer(serving, "a").json()["choices"][0]["text"] != first
    assert load(serving, "a", adapters["a"], load_inplace=True).status_code == 200
    assert answer(serving, "a").json()["choices"][0]["text"] == first


@pytest.mark.model
@pytest.mark.parametrize(
    ("body", "status", "param", "says"),
    [
        ({"lora_name": "x"}, 400, "lora_path", "Field required"),
        ({"lora_name": "x", "lora_path": 3}, 400, "lora_path", "valid string"),
        ({"lora_name": "x", "lora_path": "{dir}/a.gguf", "scale": 2}, 400, "scale", "fields: lora_name"),
        ({"lora_name": "x", "lora_path": "a.gguf"}, 400, "lora_path", "no absolute path"),
        ({"lora_name": "x", "lora_path": "{dir}/nul\0.gguf"}, 400, "lora_path", "no absolute path"),
        ({"lora_name": "x", "lora_path": "/etc/passwd"}, 400, "lora_path", "is not below"),
        ({"lora_name": "x", "lora_path": "{dir}/../../x.gguf"}, 400, "lora_path", "is not below"),
        ({"lora_name": "x", "lora_path": "{dir}/none.gguf"}, 400, "lora_path", "there is no such file"),
        ({"lora_name": "x", "lora_path": "{dir}/" + "y" * 300}, 400, "lora_path", "name too long"),
        ({"lora_name": "smollm2", "lora_path": "{dir}/a.gguf"}, 400, "lora_name", "is taken"),
        ({"lora_name": "smollm2", "lora_path": "{dir}/a.gguf", "load_inplace": True}, 400, "lora_name", "is taken"),
        ({"lora_name": " ", "lora_path": "{dir}/a.gguf"}, 400, "lora_name", "is no name"),
        ({"lora_name": "x", "lora_path": "{dir}/a.gguf", "base_model_name": "y"}, 404, "base_model_name", "smollm2"),
        ([], 400, None, "object"),
    ],
)
def test_a_bad_request_is_refused_by_name_and_changes_nothing(
    serving: Served, adapters: dict[str, Path], body: Any, status: int, param: str | None, says: str
) -> None:
    text = json.dumps(body).replace("{dir}", str(adapters["a"].parent))
    refused = httpx.post(f"{serving.url}/v1/load_lora_adapter", content=text, timeout=30)
    assert refused.status_code == status, refused.text
    error = refused.json()["error"]
    assert (error["param"], says.lower() in error["message"].lower()) == (param, True), error
    assert list(cards(serving)) == ["smollm2", "a"]


@pytest.mark.model
def test_unloading_what_is_not_loaded_is_a_404(serving: Served) -> None:
    for name in ("nobody", "smollm2"):
        refused = unload(serving, name)
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "adapter_not_found")
        assert "loaded are: a" in refused.json()["error"]["message"]


def test_without_the_setting_there_are_no_such_routes(fake: Served) -> None:
    assert load(fake, "x", "/x").status_code == 404
    assert unload(fake, "x").status_code == 404


def test_an_engine_that_takes_none_says_so() -> None:
    with Served.fake("--runtime_adapters=true", adapters=["lora-a"]) as served:
        for refused in (load(served, "x", "/x"), unload(served, "lora-a")):
            assert refused.status_code == 400
            assert "the fake engine takes no adapters" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("a=/x,b = /y ", {"a": Path("/x"), "b": Path("/y")}),
        ('{"a": "/x,y"}', {"a": Path("/x,y")}),
        ("", {}),
    ],
)
def test_adapters_are_named_in_one_setting(text: str, meant: dict[str, Path]) -> None:
    assert TypeAdapter(AdapterPaths).validate_python(text) == meant


@pytest.mark.parametrize("text", ["a", "a=", "=/x", "a=/x,a=/y", "{", '{"a": 3}'])
def test_a_setting_that_names_no_adapters_is_refused(text: str) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(AdapterPaths).validate_python(text)
