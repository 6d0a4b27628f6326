"""V1, V2 REST and V2 gRPC through the transformer, by the clients people have."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import get_ident
from typing import Any

import httpx
import numpy as np
import orjson
import pytest
import tritonclient.http as triton
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig
from kserve.inference_client import InferenceGRPCClient
from prometheus_client import CollectorRegistry
from tritonclient.utils import InferenceServerException

import aim_guardrail.pipeline.screening as screening_module
import fake_predictor
import word_family  # noqa: F401  a batch detector
from aim_guardrail.metrics import Metrics
from aim_guardrail.pipeline import Guard
from aim_guardrail.pipeline.context import RequestContext
from aim_guardrail.pipeline.screening import Screening
from aim_guardrail.policy import parse_policy
from aim_guardrail.protocols import v2
from aim_guardrail.protocols.v2 import check_binary, check_tensors, pack, unpack
from aim_guardrail.slots.slot import Slots
from aim_kserve.errors import BadRequest
from aim_kserve.grpc_parameters import decode
from aim_kserve.kserve import pb, pb_grpc
from fake_predictor import FakePredictor
from guarded import guardrail, orders
from served import Served

KEY = "AKIA" + "3XPZ7QKLMN2VWTYB"
CARD = "4111 1111 1111 1111"
MAIL = "jane.doe@example.com"


@pytest.fixture(scope="module")
def by_grpc(predictor: FakePredictor) -> Iterator[Served]:
    """A transformer whose predictor speaks gRPC only."""
    with guardrail(f"127.0.0.1:{predictor.grpc_port}", "--predictor_protocol", "grpc-v2") as server:
        yield server


# --- V1 -----------------------------------------------------------------------------------------------------------


def test_v1_checks_every_instance(client: httpx.Client, predictor: FakePredictor) -> None:
    body = {"instances": ["a", {"prompt": f"mail {MAIL}", "id": MAIL}, [CARD, 1.5]], "parameters": {"stop": [CARD]}}
    answer = client.post("/v1/models/m:predict", json=body)
    shown = ["a", {"prompt": "mail <EMAIL_ADDRESS_1>", "id": "<EMAIL_ADDRESS_1>"}, ["<CREDIT_CARD_1>", 1.5]]
    assert orjson.loads(predictor.last["body"]) == {"instances": shown, "parameters": {"stop": ["<CREDIT_CARD_1>"]}}
    assert answer.json() == {"predictions": shown}
    assert answer.headers["x-guardrail-verdict"] == "redact"


def test_v1_block_and_errors_have_kserves_shape(client: httpx.Client) -> None:
    answer = client.post("/v1/models/m:predict", json={"instances": ["a", f"key {KEY}"]})
    assert answer.status_code == 400
    assert answer.json() == {"error": "instances[1] was blocked by the guardrail: it contains secrets"}
    assert answer.headers["x-guardrail-families"] == "secrets"
    told = orders(status=400, body='{"error":"instances: too many"}', headers={"content-type": "application/json"})
    answer = client.post("/v1/models/m:predict", json={"instances": ["a"]}, headers=told)
    assert (answer.status_code, answer.json()) == (400, {"error": "instances: too many"})


async def test_kserve_rest_client(transformer: Served) -> None:
    v1, v2 = InferenceRESTClient(RESTConfig(protocol="v1")), InferenceRESTClient(RESTConfig(protocol="v2"))
    try:
        first = await v1.infer(transformer.url, {"instances": [f"to {MAIL}"]}, model_name="m")
        assert first == {"predictions": ["to <EMAIL_ADDRESS_1>"]}
        request = InferRequest("m", [InferInput("prompt", [2], "BYTES", data=["a", f"to {MAIL}"])], request_id="7")
        second = await v2.infer(transformer.url, request, model_name="m")
        assert second.outputs[0].data == ["a", "to <EMAIL_ADDRESS_1>"]
        assert second.id == "7"
        assert await v2.is_server_ready(transformer.url)
        assert await v2.is_model_ready(transformer.url, "m")
        assert await v1.is_model_ready(transformer.url, "m")
    finally:
        await v1.close()
        await v2.close()


# --- V2 REST --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("binary", [False, True])
def test_triton_http_client(transformer: Served, predictor: FakePredictor, binary: bool) -> None:
    texts = np.array([[b"a", f"to {MAIL}".encode()], ["Käse".encode(), CARD.encode()]], dtype=np.object_)
    text = triton.InferInput("prompt", [2, 2], "BYTES")
    text.set_data_from_numpy(texts, binary_data=binary)
    numbers = triton.InferInput("numbers", [3], "FP32")
    numbers.set_data_from_numpy(np.array([1.5, 2.5, 3.5], dtype=np.float32), binary_data=binary)
    with triton.InferenceServerClient(transformer.url.removeprefix("http://")) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("m")
        assert client.get_model_metadata("m")["platform"] == "fake"
        answer = client.infer("m", [numbers, text], parameters={"note": "hi"})
        got = answer.get_response()["outputs"]
        assert [tensor["shape"] for tensor in got] == [[3], [2, 2]]
        text.set_data_from_numpy(np.array([["a", "b"], ["c", KEY]], dtype=np.object_), binary_data=binary)
        with pytest.raises(InferenceServerException, match=r"secrets") as refused:
            client.infer("m", [text])
    assert KEY not in str(refused.value)
    assert MAIL.encode() not in predictor.last["body"]
    if binary:
        raw = predictor.last["body"]
        assert np.array([1.5, 2.5, 3.5], dtype=np.float32).tobytes() in raw
        assert raw.endswith(pack([b"a", b"to <EMAIL_ADDRESS_1>", "Käse".encode(), b"<CREDIT_CARD_1>"]))
    else:
        assert got[1]["data"] == ["a", "to <EMAIL_ADDRESS_1>", "Käse", "<CREDIT_CARD_1>"]
        assert got[0]["data"] == [1.5, 2.5, 3.5]


def test_untouched_binary_bodies_are_the_same_bytes(client: httpx.Client, predictor: FakePredictor) -> None:
    raw = pack([b"\xff\xfe\x00 no text", b"text"])
    tensor = {"name": "x", "shape": [2], "datatype": "BYTES", "parameters": {"binary_data_size": len(raw)}}
    head = orjson.dumps({"inputs": [tensor]})
    headers = {"inference-header-content-length": str(len(head)), "content-type": "application/octet-stream"}
    answer = client.post("/v2/models/m/infer", content=head + raw, headers=headers)
    assert predictor.last["body"] == head + raw
    length = int(answer.headers["inference-header-content-length"])
    assert answer.content[length:] == raw


@pytest.mark.parametrize(
    ("length", "body", "hint"),
    [
        ("900", b"{}", "inference-header-content-length"),
        ("x", b"{}", "inference-header-content-length"),
        ("2", b"{}", None),
        ("65", b'{"inputs":[{"datatype":"BYTES","parameters":{"binary_data_size":9}}]}'[:65], "JSON"),
        ("69", b'{"inputs":[{"datatype":"BYTES","parameters":{"binary_data_size":9}}]}', "9"),
        ("70", b'{"inputs":[{"datatype":"BYTES","parameters":{"binary_data_size":-1}}]}', "binary_data_size"),
        ("69", b'{"inputs":[{"datatype":"BYTES","parameters":{"binary_data_size":3}}]}abc', "cut short"),
    ],
)
def test_malformed_binary_bodies(client: httpx.Client, length: str, body: bytes, hint: str | None) -> None:
    told = orders(status=200, body="{}", headers={"content-type": "application/json"})
    answer = client.post(
        "/v2/models/m/infer", content=body, headers={"inference-header-content-length": length, **told}
    )
    assert answer.status_code == (400 if hint else 200)
    assert (hint or "") in answer.text


def binary_answer(raw: bytes, size: Any, length: str | None = None, status: int = 200) -> dict[str, str]:
    """The order to answer with a tensor of text in binary form, said to be of that size."""
    tensor = {"name": "text", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": size}}
    head = orjson.dumps({"model_name": "m", "outputs": [tensor]}).decode()
    headers = {
        "content-type": "application/octet-stream",
        "inference-header-content-length": length or str(len(head)),
    }
    return orders(status=status, body=head + raw.decode(), headers=headers)


MALFORMED = [
    pytest.param(binary_answer(pack([b"ab"]), 9), id="less than it says"),
    pytest.param(binary_answer(b"\x05\0\0\0ab", 6), id="an element cut short"),
    pytest.param(binary_answer(pack([b"ab"]), -1), id="less than nothing"),
    pytest.param(binary_answer(pack([b"ab"]), "6"), id="no number"),
    pytest.param(binary_answer(pack([b"ab"]), 6, length="x"), id="no length"),
    pytest.param(binary_answer(pack([b"ab"]), 6, length="9999"), id="too long"),
    pytest.param(binary_answer(pack([b"ab"]), 6, length="12"), id="no JSON"),
    pytest.param(binary_answer(pack([b"ab"]) + b"c", 6), id="more than it says"),
]


@pytest.mark.parametrize("told", MALFORMED)
def test_a_malformed_binary_answer_is_the_predictors_fault(client: httpx.Client, told: dict[str, str]) -> None:
    body = {"inputs": [{"name": "prompt", "shape": [1], "datatype": "BYTES", "data": ["hi"]}]}
    answer = client.post("/v2/models/m/infer", json=body, headers=told)
    assert answer.status_code == 502
    assert answer.json()["error"].startswith("the predictor's answer: ")


@pytest.mark.parametrize("told", MALFORMED)
async def test_a_malformed_answer_is_the_predictors_fault_over_grpc(transformer: Served, told: dict[str, str]) -> None:
    import grpc

    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await infer(transformer, ["a"], **told)
    assert refused.value.code().name == "UNAVAILABLE"
    assert "the predictor's answer" in str(refused.value.details())


def test_a_key_in_a_binary_answer_is_redacted(client: httpx.Client) -> None:
    body = {"inputs": [{"name": "prompt", "shape": [1], "datatype": "BYTES", "data": ["hi"]}]}
    answer = client.post("/v2/models/m/infer", json=body, headers=binary_answer(pack([KEY.encode()]), 4 + len(KEY)))
    assert answer.status_code == 200
    assert answer.content.endswith(pack([b"<SECRET_1>"]))


def test_statuses_of_v2_are_kept(client: httpx.Client) -> None:
    told = orders(status=404, body='{"error":"no model x"}', headers={"content-type": "application/json"})
    answer = client.post("/v2/models/x/infer", json={"inputs": []}, headers=told)
    assert (answer.status_code, answer.json()) == (404, {"error": "no model x"})
    assert client.get("/v2").json()["name"]
    assert client.get("/v2/models").status_code == 200
    assert client.get("/v2/models/other/ready").status_code == 404


def test_packing() -> None:
    elements = [b"", b"a", b"\xff" * 300]
    assert unpack(pack(elements)) == elements
    for cut in (1, 3, 5, 8):
        with pytest.raises(BadRequest, match="cut short"):
            unpack(pack([b"ab", b"c"])[: -1 if cut == 8 else cut])


# --- gRPC -----------------------------------------------------------------------------------------------------------


def triton_grpc(server: Served, *calls: dict[str, Any]) -> list[Any]:
    """tritonclient's gRPC client, in a process of its own (its protobuf names are KServe's)."""
    script = Path(fake_predictor.__file__).with_name("triton_grpc_client.py")
    lines = b"\n".join(orjson.dumps(call) for call in calls)
    done = subprocess.run([sys.executable, str(script), server.grpc_url], input=lines, capture_output=True, check=True)
    return [orjson.loads(line) for line in done.stdout.splitlines()]


async def infer(server: Served, texts: list[str], **metadata: str) -> list[str]:
    """KServe's gRPC client."""
    client = InferenceGRPCClient(server.grpc_url, timeout=20)
    try:
        tensor = InferInput("prompt", [len(texts)], "BYTES", data=[text.encode() for text in texts])
        numbers = InferInput("numbers", [2], "INT64", data=[1, 2])
        request = InferRequest("m", [tensor, numbers], request_id="9")
        answer = await client.infer(request, headers=list(metadata.items()))
        assert answer.id == "9"
        assert answer.outputs[1].data == [1, 2]
        assert answer.outputs[0].shape == [len(texts)]
        return [bytes(item).decode() for item in answer.outputs[0].data]
    finally:
        await client.close()


async def test_grpc_is_sent_on_as_v2_rest(transformer: Served, predictor: FakePredictor) -> None:
    got = await infer(transformer, ["a", f"to {MAIL}", "Käse"], **{"x-custom": "kept"})
    assert got == ["a", "to <EMAIL_ADDRESS_1>", "Käse"]
    sent = {key.lower(): value for key, value in predictor.last["headers"]}
    assert sent["x-custom"] == "kept"
    assert sent["content-type"] == "application/json"
    assert sent["traceparent"]


async def test_grpc_is_sent_on_as_grpc(by_grpc: Served, predictor: FakePredictor) -> None:
    got = await infer(by_grpc, ["a", f"to {MAIL}", "Käse"], **{"x-custom": "kept"})
    assert got == ["a", "to <EMAIL_ADDRESS_1>", "Käse"]
    sent = dict(predictor.last["headers"])
    assert predictor.last["method"] == "GRPC"
    assert sent["x-custom"] == "kept"
    assert sent["traceparent"]


@pytest.mark.parametrize(
    "code", ["INVALID_ARGUMENT", "NOT_FOUND", "UNAUTHENTICATED", "RESOURCE_EXHAUSTED", "UNAVAILABLE"]
)
async def test_grpc_codes_are_kept(by_grpc: Served, code: str) -> None:
    import grpc

    told = orjson.dumps({"code": code, "message": f"no: {MAIL}"}).decode()
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await infer(by_grpc, ["a"], **{"x-fake": told})
    assert refused.value.code().name == code
    assert refused.value.details() == "no: <EMAIL_ADDRESS_1>"


async def test_a_rest_predictors_status_is_the_grpc_code(transformer: Served) -> None:
    import grpc

    told = {"status": 400, "body": '{"error":"prompt: too long"}', "headers": {"content-type": "application/json"}}
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await infer(transformer, ["a"], **{"x-fake": orjson.dumps(told).decode()})
    assert refused.value.code().name == "INVALID_ARGUMENT"
    assert refused.value.details() == "prompt: too long"


def test_triton_grpc_client(transformer: Served, by_grpc: Served) -> None:
    for server in (transformer, by_grpc):
        ready, described, answer, blocked = triton_grpc(
            server,
            {"ask": "is_model_ready", "arguments": ["m"]},
            {"ask": "get_model_metadata", "arguments": ["m"]},
            {"infer": {"prompts": ["a", f"to {MAIL}"]}},
            {"infer": {"prompts": ["a", f"key {KEY}"]}},
        )
        assert ready is True
        assert described["inputs"][0]["name"] == "prompt"
        assert answer["text"] == ["a", "to <EMAIL_ADDRESS_1>"]
        assert blocked["status"] == "StatusCode.INVALID_ARGUMENT"
        assert blocked["message"] == "prompt[1] was blocked by the guardrail: it contains secrets"


@pytest.mark.parametrize("which", ["rest", "grpc"])
@pytest.mark.parametrize("place", ["id", "parameter", "name", "tensor parameter", "output", "output parameter"])
def test_grpc_hides_nothing_beside_its_tensors(
    transformer: Served, by_grpc: Served, predictor: FakePredictor, which: str, place: str
) -> None:
    import grpc

    def request(text: str) -> Any:
        asked = pb.ModelInferRequest(model_name="m", id=text if place == "id" else "7")
        tensor = asked.inputs.add(name=text if place == "name" else "prompt", datatype="BYTES", shape=[1])
        tensor.contents.bytes_contents.append(b"hi")
        output = asked.outputs.add(name=text if place == "output" else "text")
        holders = {"parameter": asked, "tensor parameter": tensor, "output parameter": output}
        if place in holders:
            holders[place].parameters["note"].string_param = text
        return asked

    with grpc.insecure_channel((transformer if which == "rest" else by_grpc).grpc_url) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError) as refused:
            stub.ModelInfer(request(KEY), timeout=20)
        assert refused.value.code().name == "INVALID_ARGUMENT"
        assert KEY not in refused.value.details()
        stub.ModelInfer(request(f"to {MAIL}"), timeout=20)
    assert MAIL not in str(predictor.last["body"])
    assert "<EMAIL_ADDRESS_1>" in str(predictor.last["body"])


def test_parameters_of_every_kind_pass(transformer: Served, by_grpc: Served, predictor: FakePredictor) -> None:
    """Doubles and unsigned numbers, which KServe's protocol file lacks, too."""
    given = {"temperature": 0.25, "seed": 7, "ignore_eos": False, "user": "u"}
    call = {"infer": {"prompts": ["a"], "parameters": given, "priority": 2**64 - 1}}
    triton_grpc(by_grpc, call)
    assert decode(predictor.last["body"].parameters, "parameters") == {**given, "priority": 2**64 - 1}
    triton_grpc(transformer, call)
    headers = {key.lower(): value for key, value in predictor.last["headers"]}
    length = headers.get("inference-header-content-length")
    assert orjson.loads(predictor.last["body"][: int(length) if length else None])["parameters"] == {
        **given,
        "priority": 2**64 - 1,
    }


def test_rest_to_a_grpc_predictor(by_grpc: Served) -> None:
    body = {"id": "3", "inputs": [{"name": "prompt", "shape": [2], "datatype": "BYTES", "data": ["a", f"to {MAIL}"]}]}
    answer = httpx.post(f"{by_grpc.url}/v2/models/m/infer", json=body)
    assert answer.status_code == 200
    assert answer.json()["outputs"][0]["data"] == ["a", "to <EMAIL_ADDRESS_1>"]
    assert answer.headers.get_list("x-guardrail-verdict") == ["redact"]
    body["inputs"][0]["data"][0] = KEY  # type: ignore[index]
    answer = httpx.post(f"{by_grpc.url}/v2/models/m/infer", json=body)
    assert answer.status_code == 400
    assert answer.headers.get_list("x-guardrail-verdict") == ["block"]
    answer = httpx.post(f"{by_grpc.url}/v1/models/m:predict", json={"instances": ["a"]})
    assert answer.status_code == 501
    assert "grpc-v2" in answer.json()["error"]


# --- large tensors -------------------------------------------------------------------------------------------------


async def test_large_tensors_are_read_beside_the_event_loop() -> None:
    """Unpacked, made slots of and packed in threads: whatever a body holds, others have their turn."""
    elements = [b"some text of no meaning"] * 40_000 + [MAIL.encode()]
    raw = pack(elements)
    tensor = {"name": "x", "shape": [len(elements)], "datatype": "BYTES", "parameters": {"binary_data_size": len(raw)}}
    head = orjson.dumps({"inputs": [tensor]})
    message = InferRequest("m", [InferInput("x", [len(elements)], "BYTES", data=[e.decode() for e in elements])])
    guard = Guard.load(parse_policy(POLICY, "t.yaml"))
    for check in (
        lambda screening: check_binary(screening, "prompt", head + raw, str(len(head)).encode()),
        lambda screening: check_tensors(screening, "prompt", message),
    ):
        threads: list[int] = []
        with pytest.MonkeyPatch.context() as patch:
            for name in ("unpack", "pack", "_slots", "_differ"):
                patch.setattr(v2, name, _noting(getattr(v2, name), threads))
            patch.setattr(screening_module, "passages_of", _noting(screening_module.passages_of, threads))
            await check(Screening(guard, Metrics(CollectorRegistry()), RequestContext("/v2/models/m/infer")))
        assert threads
        assert get_ident() not in threads
    assert message.inputs[0].data[-1] == "<EMAIL_ADDRESS_1>"


POLICY = "version: 2\nname: t\nbudget_ms: 9000\nprompt: [{type: pii, action: redact}, {type: words, action: block}]\n"


def _noting(what: Callable[..., Any], threads: list[int]) -> Callable[..., Any]:
    def noted(*args: Any) -> Any:
        sizes = [len(getattr(arg, "items", arg)) for arg in args if isinstance(arg, bytes | list | Slots)]
        if max(sizes) > 1000:
            threads.append(get_ident())
        return what(*args)

    return noted
