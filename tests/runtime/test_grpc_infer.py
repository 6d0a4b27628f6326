"""The Open Inference Protocol over gRPC: tritonclient, KServe's client, plain contents, status codes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import orjson
import pytest
from kserve import InferenceGRPCClient, InferInput, InferRequest

from aim_kserve.kserve import pb, pb_grpc
from fake_engine import words
from served import Served

TRITON = Path(__file__).parent.parent / "fakes" / "triton_grpc_client.py"
#: Makes the fake engine judge the body as the embedded one does, and answer with what arrived.
PARSED = {"fake": '{"parsed": true}'}
Ask = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def triton(fake: Served) -> Iterator[Ask]:
    """tritonclient: a call in, its answer or its refusal out."""
    command = [sys.executable, str(TRITON), fake.grpc_url]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def call(request: dict[str, Any]) -> Any:
            process.stdin.write(orjson.dumps(request) + b"\n")
            process.stdin.flush()
            return orjson.loads(process.stdout.readline())

        yield call
        process.stdin.close()


@pytest.fixture
def stub(fake: Served) -> Iterator[pb_grpc.GRPCInferenceServiceStub]:
    with grpc.insecure_channel(fake.grpc_url) as channel:
        yield pb_grpc.GRPCInferenceServiceStub(channel)


def test_tritonclient(triton: Ask) -> None:
    parameters = {"max_tokens": 3, "temperature": 0.5}
    answer = triton({"infer": {"prompts": ["a", "ä"], "parameters": parameters, "request_id": "7"}})
    assert answer == {"id": "7", "text": ["".join(words(3))] * 2, "finish_reason": ["length"] * 2}


def test_only_the_outputs_asked_for(triton: Ask) -> None:
    answer = triton({"infer": {"prompts": ["a"], "outputs": ["finish_reason"]}})
    assert (answer["text"], answer["finish_reason"]) == (None, ["stop"])


def test_metadata_and_readiness(triton: Ask) -> None:
    metadata = triton({"ask": "get_model_metadata", "arguments": ["m"]})
    assert metadata["inputs"] == [{"name": "prompt", "datatype": "BYTES", "shape": ["-1"]}]
    assert [item["name"] for item in metadata["outputs"]] == ["text", "finish_reason"]
    for question, arguments in (("is_server_live", []), ("is_server_ready", []), ("is_model_ready", ["m"])):
        assert triton({"ask": question, "arguments": arguments}) is True


def test_tritonclient_sends_numbers_of_every_kind(triton: Ask) -> None:
    """Floats as ``double_param`` and priorities as ``uint64_param``: neither is in KServe's protocol file."""
    given = {"temperature": 0.0, "top_p": 0.25, "seed": 7, "ignore_eos": True}
    call = {"priority": 2, "timeout": 60_000_000, "sequence_id": 5, "sequence_start": True}
    answer = triton({"infer": {"prompts": ["x"], "parameters": {**given, **PARSED}, **call}})
    assert {**orjson.loads(answer["text"][0]), **given} == orjson.loads(answer["text"][0])


async def test_kserves_client_has_no_floats_and_sends_text(fake: Served) -> None:
    client = InferenceGRPCClient(fake.grpc_url)
    parameters = {"temperature": "0.0", "max_tokens": "3", "ignore_eos": "true", "user": "5", **PARSED}
    answer = await client.infer(InferRequest("m", [InferInput("prompt", [1], "BYTES", ["x"])], parameters=parameters))
    arrived = orjson.loads(answer.outputs[0].data[0])
    assert arrived["temperature"] == 0
    assert (arrived["max_tokens"], arrived["ignore_eos"], arrived["user"]) == (3, True, "5")
    await client.close()


def test_tritons_deadline_has_its_own_status(triton: Ask) -> None:
    parameters = {"max_tokens": 500, "fake": '{"token_s": 0.05}'}
    refusal = triton({"infer": {"prompts": ["x"], "parameters": parameters, "timeout": 50_000}})
    assert refusal["status"] == "StatusCode.DEADLINE_EXCEEDED"
    assert "no answer within 0.05 s" in refusal["message"]


async def test_kserve_client(fake: Served) -> None:
    client = InferenceGRPCClient(fake.grpc_url)
    request = InferRequest("m", [InferInput("prompt", [1], "BYTES", ["x"])], parameters={"max_tokens": 2})
    answer = await client.infer(request)
    assert [list(output.data) for output in answer.outputs] == [["".join(words(2)).encode()], [b"length"]]
    assert await client.is_model_ready("m")
    await client.close()


def test_plain_contents_are_answered_by_plain_contents(stub: pb_grpc.GRPCInferenceServiceStub) -> None:
    """What grpcurl sends."""
    request = pb.ModelInferRequest(model_name="m")
    request.inputs.add(name="prompt", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"x")
    answer = stub.ModelInfer(request)
    assert not answer.raw_output_contents
    assert list(answer.outputs[0].contents.bytes_contents) == ["".join(words(16)).encode()]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"prompts": ["x"], "tensor": "text"}, "input 'text': unknown tensor"),
        ({"prompts": ["x"], "parameters": {"bogus": 1}}, "parameters.bogus: unknown parameter"),
        ({"prompts": ["x"], "parameters": {"temperature": -1}}, "prompt[0]: temperature: must be"),
        ({"prompts": ["x"], "parameters": {"temperature": -1.5}}, "prompt[0]: temperature: must be"),
        ({"prompts": ["x"], "parameters": {"top_p": 5.5, **PARSED}}, "'top_p' should be less than or equal to 1"),
        ({"prompts": ["x"], "parameters": {"top_p": "wide", **PARSED}}, "'top_p' should be a valid number"),
        ({"prompts": ["x"], "timeout": -1}, "parameters.timeout: must be an integer >= 0 (got -1)"),
        ({"prompts": ["x", "y " * 1001]}, "prompt[1]: the prompt has 1001 tokens, 1 more than"),
    ],
)
def test_bad_input_is_named(triton: Ask, call: dict[str, Any], says: str) -> None:
    refusal = triton({"infer": call})
    assert refusal["status"] == "StatusCode.INVALID_ARGUMENT"
    assert says in refusal["message"]


@pytest.mark.parametrize(
    ("raw", "says"), [(b"\x05\x00\x00\x00ab", "byte 0 of the binary data"), (b"\x02\x00\x00\x00\xff\xfe", "not UTF-8")]
)
def test_malformed_raw_contents(stub: pb_grpc.GRPCInferenceServiceStub, raw: bytes, says: str) -> None:
    request = pb.ModelInferRequest(model_name="m", raw_input_contents=[raw])
    request.inputs.add(name="prompt", datatype="BYTES", shape=[1])
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(request)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert says in caught.value.details()


def test_other_refusals(triton: Ask, stub: pb_grpc.GRPCInferenceServiceStub) -> None:
    unknown = triton({"infer": {"prompts": ["x"], "model": "other"}})
    assert unknown["status"] == "StatusCode.NOT_FOUND"
    assert "other" in unknown["message"]
    with pytest.raises(grpc.RpcError) as unload:
        stub.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name="m"))
    assert unload.value.code() == grpc.StatusCode.UNIMPLEMENTED
    assert stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="m")).isLoaded
    assert stub.ModelReady(pb.ModelReadyRequest(name="m")).ready


def test_calls_are_logged_with_their_request_id(triton: Ask, fake: Served) -> None:
    headers = {"x-request-id": "over-grpc", "traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}
    triton({"infer": {"prompts": ["a b"], "headers": headers}})
    (line,) = [line for line in fake.access_lines() if line["request_id"] == "over-grpc"]
    assert (line["trace_id"], line["parent_id"]) == ("a" * 32, "b" * 16)
    assert line["path"] == "/inference.GRPCInferenceService/ModelInfer"
    assert (line["status"], line["model"], line["prompt_tokens"], line["completion_tokens"]) == ("OK", "m", 2, 16)


def test_more_parts_than_a_request_has_are_refused_by_their_number(stub: pb_grpc.GRPCInferenceServiceStub) -> None:
    """Half a million empty outputs fit into a message, and each would be looked at by the event loop."""
    for field in ("inputs", "outputs"):
        request = pb.ModelInferRequest(model_name="m")
        for _ in range(5000):
            getattr(request, field).add(name="text")
        with pytest.raises(grpc.RpcError) as refusal:
            stub.ModelInfer(request)
        assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "5000 parts" in refusal.value.details()
