"""The Open Inference Protocol over REST: JSON and binary, tritonclient and KServe's own client."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import orjson
import pytest
import tritonclient.http as triton
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig

from aim_kserve.v2_body import read_binary
from aim_runtime.engines.llama_cpp.request import REQUESTS
from aim_runtime.fields import fields_of
from aim_runtime.kserve_api import read_v2
from fake_engine import words
from served import Served

INFER = "/v2/models/m/infer"


def tensor(**change: Any) -> dict[str, Any]:
    return {"name": "prompt", "shape": [2], "datatype": "BYTES", "data": ["x", "y"], **change}


@pytest.fixture
def client(fake: Served) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(f"127.0.0.1:{fake.http_port}") as client:
        yield client


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False, None])
def test_tritonclient(client: triton.InferenceServerClient, binary_in: bool, binary_out: bool | None) -> None:
    prompts = triton.InferInput("prompt", [3], "BYTES")
    prompts.set_data_from_numpy(np.array(["a", "ä", "c d"], dtype=object), binary_data=binary_in)
    wanted = [triton.InferRequestedOutput(name, binary_data=binary_out) for name in ("text", "finish_reason")]
    answer = client.infer(
        "m", [prompts], outputs=None if binary_out is None else wanted, parameters={"max_tokens": 3}, request_id="42"
    )
    text, reason = ([_str(item) for item in answer.as_numpy(name)] for name in ("text", "finish_reason"))
    assert text == ["".join(words(3))] * 3
    assert reason == ["length"] * 3
    assert answer.get_response()["id"] == "42"


def _str(item: Any) -> str:
    return item.decode() if isinstance(item, bytes) else str(item)


def test_more_prompts_than_anyone_batches_are_refused_by_their_number(
    fake: Served, client: triton.InferenceServerClient
) -> None:
    answer = httpx.post(fake.url + INFER, json={"inputs": [tensor(shape=[2000], data=["x"] * 2000)]})
    assert answer.status_code == 400
    assert "2000 prompts" in answer.json()["error"]
    prompts = triton.InferInput("prompt", [2000], "BYTES")
    prompts.set_data_from_numpy(np.array(["x"] * 2000, dtype=object))
    with pytest.raises(triton.InferenceServerException, match="2000 prompts"):
        client.infer("m", [prompts])


def test_only_the_outputs_asked_for(fake: Served) -> None:
    body = {"inputs": [tensor()], "outputs": [{"name": "finish_reason"}]}
    outputs = httpx.post(fake.url + INFER, json=body).json()["outputs"]
    assert [(output["name"], output["shape"], output["data"]) for output in outputs] == [
        ("finish_reason", [2], ["stop", "stop"])
    ]


def test_metadata_and_readiness(client: triton.InferenceServerClient) -> None:
    metadata = client.get_model_metadata("m")
    assert metadata["inputs"] == [{"name": "prompt", "datatype": "BYTES", "shape": [-1]}]
    assert [output["name"] for output in metadata["outputs"]] == ["text", "finish_reason"]
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("m")
    assert not client.is_model_ready("other")


async def test_kserve_client(fake: Served) -> None:
    client = InferenceRESTClient(RESTConfig(protocol="v2"))
    prompts = InferInput("prompt", [2], "BYTES", ["a", "b"])
    answer = await client.infer(fake.url, InferRequest("m", [prompts], parameters={"max_tokens": 2}), model_name="m")
    assert [(output.name, output.data) for output in answer.outputs] == [
        ("text", ["".join(words(2))] * 2),
        ("finish_reason", ["length"] * 2),
    ]
    await client.close()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"stop": '["a", "b"]'}, ["a", "b"]),
        ({"stop": "[not json"}, "[not json"),
        ({"stop": "plain"}, "plain"),
    ],
)
def test_parameters_that_are_not_scalars_are_json_text(given: dict[str, str], says: Any) -> None:
    request = InferRequest("m", [InferInput("prompt", [1], "BYTES", ["x"])], parameters=given)
    assert read_v2(request, {name: fields_of(model) for name, model in REQUESTS.items()})[0].body["stop"] == says


@pytest.mark.parametrize("level", [None, 0, 1, 2, 9, 2**64 - 1])
def test_tritons_priority_levels_are_ignored_and_told(level: int | None) -> None:
    parameters = {} if level is None else {"priority": level}
    request = InferRequest("m", [InferInput("prompt", [1], "BYTES", ["x"])], parameters=parameters)
    (question,) = read_v2(request, {name: fields_of(model) for name, model in REQUESTS.items()})
    assert (question.ignored, question.timeout_s) == (("priority",) if (level or 0) > 1 else (), None)
    assert "priority" not in question.body


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"inputs": [tensor(name="text")]}, "input 'text': unknown tensor"),
        ({"inputs": [tensor(), tensor()]}, "2 input tensors"),
        ({"inputs": []}, "0 input tensors"),
        ({"inputs": [tensor(datatype="INT32", data=[1, 2])]}, "datatype must be BYTES, not INT32"),
        ({"inputs": [tensor(shape=[1, 2])]}, "shape must be [n] with n >= 1, not [1, 2]"),
        ({"inputs": [tensor(shape=[0], data=[])]}, "shape must be [n] with n >= 1, not [0]"),
        ({"inputs": [tensor(shape=[3])]}, "shape [3] but 2 elements"),
        ({"inputs": [tensor(data=["x", 5])]}, "prompt[1]: must be a string, not a number"),
        ({"inputs": [tensor(data=[["x"], ["y"]])]}, "prompt[0]: must be a string, not a list"),
        ({"inputs": [tensor()], "parameters": {"bogus": 1}}, "parameters.bogus: unknown parameter"),
        ({"inputs": [tensor()], "parameters": {"temperature": -1}}, "prompt[0]: temperature"),
        ({"inputs": [tensor()], "outputs": [{"name": "logits"}]}, "output 'logits': unknown tensor"),
        ({"inputs": [tensor()], "params": {"temperature": 0}}, "params: unknown"),
        ({"inputs": [{"name": "prompt"}]}, "inputs"),
        ({}, "inputs"),
    ],
)
def test_bad_input_is_named(fake: Served, body: Any, says: str) -> None:
    answer = httpx.post(fake.url + INFER, json=body)
    assert answer.status_code == 400, answer.text
    assert says in answer.json()["error"]


@pytest.mark.parametrize(
    ("header", "tail", "says"),
    [
        (b'{"inputs": [{"name": "prompt"}]}', b"", "lacks 'shape'"),
        (b'{"outputs": []}', b"", "lacks 'inputs'"),
        (b'{"inputs": 5}', b"", "not a V2 inference request"),
        (b'{"inputs": [', b"", "Unrecognized request format"),
        (
            b'{"inputs": [{"name": "prompt", "shape": [1], "datatype": "BYTES",'
            b' "parameters": {"binary_data_size": 6}}]}',
            b"\x05\x00\x00\x00ab",
            "not a V2 inference request",
        ),
    ],
)
def test_malformed_binary_bodies(fake: Served, header: bytes, tail: bytes, says: str) -> None:
    headers = {"inference-header-content-length": str(len(header)), "content-type": "application/octet-stream"}
    answer = httpx.post(fake.url + INFER, content=header + tail, headers=headers)
    assert answer.status_code == 400, answer.text
    assert says in answer.json()["error"]


def test_the_only_model_cannot_be_unloaded(client: triton.InferenceServerClient, fake: Served) -> None:
    refusal = httpx.post(f"{fake.url}/v2/repository/models/m/unload")
    assert refusal.status_code == 501
    assert "lives as long as this process" in refusal.json()["error"]
    assert httpx.post(f"{fake.url}/v2/repository/models/m/load").json() == {"name": "m", "load": True}
    assert httpx.post(f"{fake.url}/v2/repository/models/other/load").status_code == 404
    assert client.is_model_ready("m")


def element(*texts: bytes) -> bytes:
    return b"".join(len(text).to_bytes(4, "little") + text for text in texts)


def raw(size: Any = 6, **change: Any) -> dict[str, Any]:
    return {"name": "prompt", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": size}, **change}


def infer_binary(server: Served, header: Any, tail: bytes) -> httpx.Response:
    text = header if isinstance(header, bytes) else orjson.dumps(header)
    headers = {"inference-header-content-length": str(len(text)), "content-type": "application/octet-stream"}
    return httpx.post(server.url + INFER, content=text + tail, headers=headers, timeout=60)


HI = element(b"hi")


@pytest.mark.parametrize(
    ("header", "tail", "says"),
    [
        ({"inputs": [raw()], "params": {"temperature": 0}}, HI, "params: unknown"),
        ({"inputs": [raw(shape=[2])]}, HI, "shape [2] but 1 elements"),
        ({"inputs": [raw(shape=[-1])]}, HI, "inputs[0].shape: -1"),
        ({"inputs": [raw(shape=[0])]}, HI, "shape must be [n] with n >= 1"),
        ({"inputs": [raw(12)]}, element(b"hi", b"yo"), "shape [1] but 2 elements"),
        ({"inputs": [raw(shape=[1] * 1000)]}, HI, "inputs[0].shape: 1000 dimensions"),
        ({"inputs": [raw(datatype="INT32", shape=[3])]}, HI, "inputs[0]: 3 elements of INT32 are 12 bytes, not 6"),
        ({"inputs": [raw(8, datatype="FP64")]}, element(b"hihi"), "datatype must be BYTES, not FP64"),
        ({"inputs": [raw(datatype="WORDS")]}, HI, "inputs[0].datatype: 'WORDS'"),
        ({"inputs": [raw(datatype=5)]}, HI, "inputs.0.datatype"),
        ({"inputs": [raw()]}, element(b"\xff\xfe"), "prompt[0]: not UTF-8 at byte 0"),
        ({"inputs": [raw()], "id": 5}, HI, "id: Input should be a valid string"),
        ({"inputs": [raw()], "outputs": [{"name": ["text"]}]}, HI, "outputs.0.name"),
        ({"inputs": [raw("6")]}, HI, "binary_data_size"),
        ({"inputs": [raw(-6)]}, HI, "binary_data_size"),
        ({"inputs": [raw(True)]}, HI, "binary_data_size"),
        ({"inputs": [raw(10**12)]}, HI, "binary_data_size"),
        ({"inputs": [raw(7)]}, HI, "binary_data_size"),
        ({"inputs": [raw()]}, HI + b"more", "4 bytes follow the last tensor"),
        ({"inputs": [raw(data=["hi"])]}, HI, "either 'data' or 'binary_data_size'"),
        ({"inputs": [tensor(data={"a": 1})]}, b"", "inputs.0.data"),
        ({"inputs": [{"name": "prompt", "shape": [1], "datatype": "BYTES"}]}, b"", "lacks 'data'"),
        ([1], b"", "not a V2 inference request"),
        (b'{"inputs": [{"name": "\\ud800"}]}', b"", "Unrecognized request format"),
    ],
)
def test_binary_bodies_that_contradict_themselves(fake: Served, header: Any, tail: bytes, says: str) -> None:
    answer = infer_binary(fake, header, tail)
    assert answer.status_code == 400, answer.text
    assert says in answer.json()["error"]


def test_no_object_is_made_of_a_binary_element() -> None:
    """Before a model has looked at the tensor: a Python object of each of 30 million booleans takes 8 s."""
    for datatype in ("BOOL", "BYTES"):
        header = orjson.dumps({"inputs": [raw(32, datatype=datatype, shape=[32])]})
        (read,) = read_binary(header + bytes(32), len(header), "m").inputs
        assert (read._raw_data, read.data) == (bytes(32), [])


@pytest.mark.parametrize(
    "body",
    [
        b'{"inputs":[' + b",".join([b"{}"] * 400_000) + b"]}",
        b'{"inputs":[{"name":"prompt","datatype":"BYTES","data":[],"shape":[' + b",".join([b'"x"'] * 400_000) + b"]}]}",
        b'{"inputs":[],"parameters":{' + b",".join(b'"%d":[]' % i for i in range(400_000)) + b"}}",
        b'{"inputs":[],"outputs":[' + b",".join([b"[]"] * 400_000) + b"]}",
        b'{"inputs":[' + b",".join([b"[]"] * 2_000_000) + b"]}",
    ],
)
@pytest.mark.parametrize("binary", [False, True])
def test_wrong_parts_are_not_described_by_the_thousand(fake: Served, body: bytes, binary: bool) -> None:
    """Pydantic, behind KServe's routes, takes 13 s for half a million of them: it must not see them."""
    answer = infer_binary(fake, body, b"") if binary else httpx.post(fake.url + INFER, content=body, timeout=60)
    assert answer.status_code == 400, answer.text
    assert re.search("commas and may have|parts and may have", answer.json()["error"])


@pytest.mark.parametrize(
    "change",
    [
        b'"id": "\\ud800", "inputs": [{"name": "prompt", "shape": [1], "datatype": "BYTES", "data": ["x"]}]',
        b'"inputs": [{"name": "prompt", "shape": [1], "datatype": "\\udfff", "data": ["x"]}]',
        b'"inputs": [{"name": "prompt", "shape": [1], "datatype": "BYTES", "data": ["\\ud800"]}]',
        b'"parameters": {"temperature": NaN}, "inputs": []',
    ],
)
def test_what_only_python_takes_for_json_is_refused(fake: Served, change: bytes) -> None:
    """Half a character cannot be written back, and no other route reads it."""
    for coding in ("utf-8", "utf-16"):
        content = (b"{" + change + b"}").decode().encode(coding)
        answer = httpx.post(fake.url + INFER, content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 400, answer.text
        assert "Unrecognized request format" in answer.json()["error"]
