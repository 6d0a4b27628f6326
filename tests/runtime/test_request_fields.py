"""Every field of the request models over every protocol: it arrives as it was sent, or it is refused by name.

The fields and their limits are read off the models, so a new one is tested without a word here. The server is the
real one; the fake engine judges bodies by the embedded engine's own models and answers with what has arrived.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import annotated_types
import grpc
import httpx
import msgspec
import orjson
import pytest
from pydantic import BaseModel, Field

from aim_kserve.errors import BadRequest
from aim_kserve.grpc_parameters import encode
from aim_kserve.kserve import pb, pb_grpc
from aim_runtime.engines.base import Json
from aim_runtime.engines.llama_cpp import engine as embedded
from aim_runtime.engines.llama_cpp.refused import UnsupportedFields
from aim_runtime.engines.llama_cpp.request import REQUESTS, parse
from aim_runtime.fields import HARMLESS, MISLEADING, Fields, fields_of, takes
from aim_runtime.kserve_api import OPENAI_ONLY
from llama_engine import context, loaded
from served import Served

CHAT, COMPLETIONS = "chat/completions", "completions"
INPUTS: dict[str, Json] = {CHAT: {"messages": [{"role": "user", "content": "x"}]}, COMPLETIONS: {"prompt": "x"}}
#: One or two of every kind of JSON, with what some fields want to see inside.
VALUES: tuple[Any, ...] = (
    *(True, False, 0, 1, 2, -1, 0.5, -1.5, 1e300, "x", ""),
    *(["x"], [1], [True], [["x"]], [], {}, {"a": 1}, {"5": 1.5}, {"type": "json_object"}, {"include_usage": True}),
    *([{"role": "user", "content": "y"}], [{"type": "function", "function": {"name": "f"}}]),
)
#: All but the one that says which model is asked.
FIELDS = sorted({name for operation in INPUTS for name in fields_of(REQUESTS[operation]) or ()} - {"model"})
MISSPELT = "temprature"


def values(operation: str, name: str) -> list[Any]:
    """Some that the field takes, some that it does not, and its limits with their neighbours."""
    fields, model = fields_of(REQUESTS[operation]), REQUESTS[operation].model_fields
    if name not in model:
        return [value for value in VALUES if value not in (False, "", [], {})][:3]
    good = [value for value in VALUES if takes(fields, name, value)]
    bad = [value for value in VALUES if not takes(fields, name, value)]
    return [*good[:4], *bad[:2], *bad[2::4], *limits(model[name])]


def limits(info: Any) -> Iterator[Any]:
    """From the bounds of a field's numbers: ``Annotated[int, Field(ge=0, le=20)] | None``."""
    for part in _annotations(info.annotation):
        for bound in _bounds(part):
            for kind in ("ge", "gt", "le", "lt"):
                edge = getattr(bound, kind, None)
                if edge is not None:
                    yield from (edge - 1, edge, edge + 1)


def _annotations(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in getattr(annotation, "__args__", ()):
        yield from _annotations(part)


def _bounds(annotation: Any) -> Iterator[Any]:
    for item in getattr(annotation, "__metadata__", ()):
        yield from (
            part for part in getattr(item, "metadata", [item]) if isinstance(part, annotated_types.BaseMetadata)
        )


@dataclass
class Answer:
    """``arrived``: what the engine was given; None where it was refused, and ``said`` why."""

    arrived: Json | None
    said: str = ""
    ignored: str = ""


class OpenAI:
    """``own``: names that have another meaning in this protocol, and tests of their own."""

    carries_all = True
    own: frozenset[str] = frozenset()

    def __init__(self, server: Served, operation: str) -> None:
        self.operation = operation
        self._client = httpx.Client(base_url=server.url)

    def close(self) -> None:
        self._client.close()

    def sent(self, value: Any) -> Any:
        """The value as this protocol can say it."""
        return value

    def ask(self, name: str, value: Any) -> Answer:
        body = {**INPUTS[self.operation], "fake": {"parsed": True}, name: value}
        answer = self._client.post(f"/v1/{self.operation}", content=orjson.dumps(body))
        if answer.status_code == 400:
            error = answer.json()["error"]
            return Answer(None, f"{error['param']} {error['message']}")
        assert answer.status_code == 200, (name, value, answer.text)
        (choice,) = answer.json()["choices"]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        return Answer(orjson.loads(text), ignored=answer.headers.get("x-ignored-fields", ""))


class V1(OpenAI):
    carries_all = False
    own = frozenset({"messages", "prompt"})

    def ask(self, name: str, value: Any) -> Answer:
        body = {"instances": [INPUTS[self.operation]], "parameters": {"fake": {"parsed": True}, name: value}}
        answer = self._client.post("/v1/models/m:predict", content=orjson.dumps(body))
        if answer.status_code == 400:
            return Answer(None, answer.json()["error"])
        assert answer.status_code == 200, (name, value, answer.text)
        return Answer(orjson.loads(answer.json()["predictions"][0]["text"]))


class V2(OpenAI):
    """Parameters are scalars: the rest is JSON text."""

    carries_all = False
    own = frozenset({"prompt"})

    def sent(self, value: Any) -> Any:
        return orjson.dumps(value).decode() if isinstance(value, (list, dict)) else value

    def ask(self, name: str, value: Any) -> Answer:
        tensor = {"name": "prompt", "shape": [1], "datatype": "BYTES", "data": ["x"]}
        parameters = {"fake": '{"parsed": true}', name: self.sent(value)}
        answer = self._client.post(
            "/v2/models/m/infer", content=orjson.dumps({"inputs": [tensor], "parameters": parameters})
        )
        if answer.status_code == 400:
            return Answer(None, answer.json()["error"])
        assert answer.status_code == 200, (name, value, answer.text)
        return Answer(orjson.loads(answer.json()["outputs"][0]["data"][0]))


class Grpc(V2):
    """As tritonclient speaks: doubles and all."""

    def __init__(self, server: Served, operation: str) -> None:
        super().__init__(server, operation)
        self._channel = grpc.insecure_channel(server.grpc_url)
        self._stub = pb_grpc.GRPCInferenceServiceStub(self._channel)

    def close(self) -> None:
        super().close()
        self._channel.close()

    def ask(self, name: str, value: Any) -> Answer:
        request = pb.ModelInferRequest(model_name="m")
        request.inputs.add(name="prompt", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"x")
        for key, one in encode({"fake": '{"parsed": true}', name: self.sent(value)}).items():
            kind = {bool: "bool_param", int: "int64_param", str: "string_param"}.get(type(one))
            request.parameters[key].CopyFrom(one if kind is None else pb.InferParameter(**{kind: one}))
        try:
            answer = self._stub.ModelInfer(request)
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.INVALID_ARGUMENT:
                raise
            return Answer(None, error.details())
        return Answer(orjson.loads(answer.outputs[0].contents.bytes_contents[0]))


class GrpcText(Grpc):
    """As KServe's own client must: it has no floats, so numbers go as text."""

    def sent(self, value: Any) -> Any:
        return value if isinstance(value, str) else orjson.dumps(value).decode()


PROTOCOLS = [(OpenAI, CHAT), (OpenAI, COMPLETIONS), (V1, CHAT), (V1, COMPLETIONS)]
PROTOCOLS += [(protocol, COMPLETIONS) for protocol in (V2, Grpc, GrpcText)]


@pytest.fixture(scope="module", params=PROTOCOLS, ids=[f"{kind.__name__}-{op.split('/')[0]}" for kind, op in PROTOCOLS])
def protocol(request: pytest.FixtureRequest, fake: Served) -> Iterator[OpenAI]:
    kind, operation = request.param
    asker: OpenAI = kind(fake, operation)
    yield asker
    asker.close()


def expected(protocol: OpenAI, name: str, value: Any) -> Any:
    """What should arrive; BadRequest where nothing may."""
    model = REQUESTS[protocol.operation]
    if name not in model.model_fields or (not protocol.carries_all and name in OPENAI_ONLY):
        raise BadRequest(f"{name} is unknown here")
    parsed = parse(model, {**INPUTS[protocol.operation], name: value})
    return orjson.loads(parsed.model_dump_json(exclude_unset=True, by_alias=True))[name]


@pytest.mark.parametrize("name", FIELDS)
def test_it_arrives_or_is_refused_by_name(protocol: OpenAI, name: str) -> None:
    if name in protocol.own:
        return
    model = REQUESTS[protocol.operation]
    for value in values(protocol.operation, name):
        if isinstance(value, int) and not -(2**63) <= value < 2**64:
            continue  # no protocol's integer
        sent = protocol.sent(value)
        if sent is not value and takes(fields_of(model), name, sent):
            continue  # a field of text: there is no telling text from JSON text
        answer = protocol.ask(name, value)
        assert not answer.ignored
        try:
            wanted = expected(protocol, name, value)
        except BadRequest:
            assert answer.arrived is None, f"{name}={value!r} was let pass, and {answer.arrived} arrived"
            assert name in answer.said
        else:
            assert answer.arrived is not None, f"{name}={value!r}: {answer.said}"
            assert answer.arrived[name] == wanted, value
            assert type(answer.arrived[name]) is type(wanted)


@pytest.mark.parametrize("name", sorted(MISLEADING))
def test_other_servers_constraints_are_refused(protocol: OpenAI, name: str) -> None:
    answer = protocol.ask(name, "a")
    assert answer.arrived is None
    assert name in answer.said


def test_a_misspelt_field_is_told(protocol: OpenAI, fake: Served) -> None:
    labels = f'adapter="",engine="fake",model_name="m",operation="{protocol.operation}",variant=""'
    counted = f"aim_ignored_fields_total{{{labels}}}"
    before = _value(fake, counted)
    answer = protocol.ask(MISSPELT, 0.5)
    if protocol.carries_all:
        assert answer.ignored == MISSPELT
        assert _value(fake, counted) == before + 1
    else:
        assert answer.arrived is None
        assert f"{MISSPELT}: unknown parameter; did you mean temperature?" in answer.said


def _value(server: Served, name: str) -> float:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


# --- what a field takes ---------------------------------------------------------------------------------------------


class Inner(BaseModel):
    deep: list[Inner] = []


class Asked(BaseModel):
    text: str = ""
    number: float | None = None
    whole: Literal[1, 2] = 1
    mode: Literal["a"] | list[int] | list[list[str]] = "a"
    inner: Inner | None = None
    other: int = Field(0, alias="else")
    odd: Callable[[], None] | None = None


TAKEN = {
    "text": ["", "[1]"],
    "number": [None, 1, 0.5],
    "whole": [1],
    "mode": ["b", [], [1], [["x"], []]],
    "inner": [{}, None],
    "else": [1],
    "other": [1],
    "odd": [1, "x", [1]],
}
REFUSED = {
    "text": [None, 1, ["x"], {}],
    "number": ["1", True, [1]],
    "whole": ["1", None, 1.5],
    "mode": [1, ["x"], [["x", 1]], [1, ["x"]]],
    "inner": ["x", []],
    "else": ["1"],
    "bogus": [None, 1],
}


def test_the_kinds_of_a_field_survive_the_way_to_another_process() -> None:
    fields = fields_of(Asked)
    sent = msgspec.msgpack.decode(msgspec.msgpack.encode(fields), type=Fields)
    assert sent == fields
    for known in (fields, sent):
        assert [
            (name, value) for name, values in TAKEN.items() for value in values if not takes(known, name, value)
        ] == []
        assert [
            (name, value) for name, values in REFUSED.items() for value in values if takes(known, name, value)
        ] == []


def test_a_union_of_models_knows_what_its_members_know() -> None:
    assert set(fields_of(Asked | Inner) or ()) == {*TAKEN, "deep"}
    assert set(fields_of(Annotated[Asked | Inner, "told"]) or ()) == {*TAKEN, "deep"}
    assert fields_of(Asked | int) is None
    assert fields_of(None) is None


# --- unknown fields ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(HARMLESS - {"model"}))
def test_what_concerns_the_account_is_taken_without_a_word(fake: Served, name: str) -> None:
    asker = OpenAI(fake, CHAT)
    answer = asker.ask(name, "x")
    asker.close()
    assert answer.arrived is not None
    assert not answer.ignored


def test_ignored_fields_are_named_in_one_safe_line(fake: Served) -> None:
    names = ["a\r\nx-injected: 1", "ü" * 200, *(f"f{i}" for i in range(20))]
    body = {**INPUTS[CHAT], "max_tokens": 1, "stream": True, "asks_nothing": None, **dict.fromkeys(names, 1)}
    answer = httpx.post(f"{fake.url}/v1/{CHAT}", json=body)
    assert answer.status_code == 200
    assert "x-injected" not in answer.headers
    told = answer.headers["x-ignored-fields"]
    assert told.startswith("a\\r\\nx-injected: 1, \\xfc")
    assert told.endswith("f7, and 12 more")
    assert len(told) < 400


def test_a_body_of_too_many_fields_is_refused(fake: Served) -> None:
    answer = httpx.post(f"{fake.url}/v1/{CHAT}", json={**INPUTS[CHAT], **{f"f{i}": 1 for i in range(600)}})
    assert answer.status_code == 400
    assert "at most" in answer.json()["error"]["message"]


def test_strictly_unknown_fields_are_refused() -> None:
    with Served.fake("--strict_fields") as server:
        for stream in (False, True):
            body = {**INPUTS[CHAT], "max_tokens": 1, "stream": stream}
            answer = httpx.post(f"{server.url}/v1/{CHAT}", json={**body, MISSPELT: 0.5})
            error = answer.json()["error"]
            assert (answer.status_code, error["param"], error["code"]) == (400, MISSPELT, "unknown_field")
            assert "did you mean temperature?" in error["message"]
            assert httpx.post(f"{server.url}/v1/{CHAT}", json={**body, "store": True, "bogus": None}).status_code == 200


# --- Triton's reserved parameters ---------------------------------------------------------------------------------


def infer(server: Served, parameters: Json, tensor: Json | None = None, **more: Any) -> httpx.Response:
    prompt = {"name": "prompt", "shape": [1], "datatype": "BYTES", "data": ["x"], **(tensor or {})}
    return httpx.post(f"{server.url}/v2/models/m/infer", json={"inputs": [prompt], "parameters": parameters, **more})


def test_tritons_sequence_parameters_mean_nothing_to_a_stateless_model(fake: Served) -> None:
    given = {"sequence_id": 7, "sequence_start": True, "sequence_end": False, "priority": 2, "timeout": 60_000_000}
    assert infer(fake, {**given, "max_tokens": 1}).status_code == 200


def test_tritons_timeout_ends_the_request(fake: Served) -> None:
    before = set(_state(fake)["aborted"])
    answer = infer(fake, {"timeout": 50_000, "max_tokens": 500, "fake": '{"token_s": 0.05}'})
    assert answer.status_code == 504
    assert "no answer within 0.05 s" in answer.json()["error"]
    deadline = time.monotonic() + 10
    while not set(_state(fake)["aborted"]) - before:
        assert time.monotonic() < deadline
    assert infer(fake, {"timeout": 0, "max_tokens": 1}).status_code == 200


def _state(server: Served) -> Json:
    state: Json = httpx.post(f"{server.url}/v1/fake/state", json={}).json()
    return state


@pytest.mark.parametrize("name", ["timeout", "priority"])
@pytest.mark.parametrize("value", [-1, 0.5, "soon", True])
def test_tritons_numbers_are_checked(fake: Served, name: str, value: Any) -> None:
    answer = infer(fake, {name: value})
    assert answer.status_code == 400
    assert f"parameters.{name}: must be an integer >= 0" in answer.json()["error"]


@pytest.mark.parametrize(
    ("tensor", "more", "says"),
    [
        (
            {"parameters": {"shared_memory_region": "r"}},
            {},
            "tensor 'prompt': parameters.shared_memory_region: unknown",
        ),
        ({}, {"outputs": [{"name": "text", "parameters": {"classification": 3}}]}, "'text': parameters.classification"),
    ],
)
def test_what_is_asked_of_a_tensor_and_not_done_is_refused(fake: Served, tensor: Json, more: Json, says: str) -> None:
    answer = infer(fake, {"max_tokens": 1}, tensor, **more)
    assert answer.status_code == 400
    assert says in answer.json()["error"]


# --- the embedded engine uses what it takes -------------------------------------------------------------------------

#: What the engine takes and need not look at: said elsewhere, of the account, or false and nothing else.
UNUSED = {CHAT: {"messages", "model", "user", "parallel_tool_calls", "echo"}, COMPLETIONS: {"prompt", "model", "user"}}


@pytest.mark.model
@pytest.mark.parametrize("operation", [CHAT, COMPLETIONS])
def test_the_engine_reads_every_field_it_takes(
    embedded_model: Path, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A field that is declared and then forgotten would be ignored in silence."""
    read: set[str] = set()
    model = REQUESTS[operation]

    class Watched(model):  # type: ignore[misc, valid-type]
        def __getattribute__(self, name: str) -> Any:
            read.add(name)
            return super().__getattribute__(name)

    def parsed(_: Any, body: Json) -> Any:
        request = parse(Watched, body)
        read.clear()
        return request

    async def ask() -> None:
        async with loaded(embedded_model) as engine:
            monkeypatch.setattr(embedded, "parse", parsed)
            body: Json = {**INPUTS[operation], "max_tokens": 1, "logprobs": operation == CHAT or 1}
            await engine.operations[operation](body, context())

    asyncio.run(ask())
    forgotten = set(model.model_fields) - read - set(UnsupportedFields.model_fields) - UNUSED[operation]
    assert forgotten == set()
