"""The Open Inference Protocol over REST: JSON and binary, tritonclient and KServe's own client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig

from aim_runtime.engines.llama_cpp.request import REQUESTS
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
    assert read_v2(request, REQUESTS)[0].body["stop"] == says


@pytest.mark.parametrize(("level", "priority"), [(None, 0), (0, 0), (1, 0), (2, 1), (9, 8), (2**64 - 1, 2**31 - 1)])
def test_tritons_priority_levels_only_step_back(level: int | None, priority: int) -> None:
    parameters = {} if level is None else {"priority": level}
    request = InferRequest("m", [InferInput("prompt", [1], "BYTES", ["x"])], parameters=parameters)
    (question,) = read_v2(request, REQUESTS)
    assert (question.priority, question.timeout_s) == (priority, None)
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
