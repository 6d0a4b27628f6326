"""Parameters over gRPC: Triton's kinds of number, which KServe's protocol file lacks, and what is no value at all."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aim_kserve.errors import BadRequest
from aim_kserve.grpc_parameters import decode, encode
from aim_kserve.kserve import pb

SCALARS = st.one_of(st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(allow_nan=False), st.text(max_size=20))


@given(st.dictionaries(st.text(max_size=8), SCALARS, max_size=4))
def test_what_is_written_is_read(parameters: dict[str, object]) -> None:
    message = pb.ModelInferRequest()
    for name, value in encode(parameters).items():
        kind = {bool: "bool_param", int: "int64_param", str: "string_param"}.get(type(value))
        message.parameters[name].CopyFrom(value if kind is None else pb.InferParameter(**{kind: value}))
    read = decode(pb.ModelInferRequest.FromString(message.SerializeToString()).parameters, "parameters")
    assert read == parameters
    assert {name: type(value) for name, value in read.items()} == {name: type(v) for name, v in parameters.items()}


def test_tritons_own_bytes() -> None:
    """As tritonclient serializes ``double_param: -1.5`` and ``uint64_param: 2**64 - 1``."""
    double = pb.InferParameter.FromString(bytes.fromhex("21000000000000f8bf"))
    unsigned = pb.InferParameter.FromString(bytes.fromhex("28ffffffffffffffffff01"))
    assert decode({"a": double, "b": unsigned}, "parameters") == {"a": -1.5, "b": 2**64 - 1}
    nan = decode({"a": pb.InferParameter.FromString(bytes.fromhex("21000000000000f87f"))}, "parameters")["a"]
    assert math.isnan(nan)


@pytest.mark.parametrize(
    "wire",
    ["", "3001", "2001", "290000000000000000", "080121000000000000f8bf", "21000000000000f8bf2801", "320161"],
    ids=["nothing", "field 6", "double as varint", "uint64 as fixed64", "two values", "two unknown", "bytes"],
)
def test_what_is_no_known_value_is_refused_by_name(wire: str) -> None:
    parameter = pb.InferParameter.FromString(bytes.fromhex(wire))
    with pytest.raises(BadRequest, match=r"parameters\.top_p: must hold one of") as caught:
        decode({"top_p": parameter}, "parameters")
    assert caught.value.param == "top_p"
