"""V2 parameters over gRPC, with the two kinds of number that KServe's protocol file lacks.

Triton's ``InferParameter`` may hold ``double_param = 4`` and ``uint64_param = 5``; to KServe's these are unknown
fields, which protobuf keeps as they came and KServe drops in silence. They are read from, and written to, the wire.
Field numbers: https://github.com/triton-inference-server/common/blob/main/protobuf/grpc_service.proto
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from typing import Any

from google.protobuf.unknown_fields import UnknownFieldSet

from aim_kserve.errors import BadRequest
from aim_kserve.kserve import pb

Scalar = str | bool | int | float

_DOUBLE, _UINT64 = 4, 5
_VARINT, _FIXED64 = 0, 1  # https://protobuf.dev/programming-guides/encoding/#structure
_INT64_MAX, _UINT64_MAX = 2**63 - 1, 2**64 - 1


def decode(parameters: Mapping[str, Any], where: str) -> dict[str, Scalar]:
    """The values of a message's ``parameters``.

    Raises:
        BadRequest: a parameter holds no value, or one of a kind nobody here knows; ``where`` and its name are told.
    """
    return {name: _value(parameter, f"{where}.{name}", name) for name, parameter in parameters.items()}


def _value(parameter: Any, where: str, name: str) -> Scalar:
    known = parameter.WhichOneof("parameter_choice")
    unknown = list(UnknownFieldSet(parameter))
    if not unknown and known is not None:
        value: Scalar = getattr(parameter, known)
        return value
    if len(unknown) == 1 and known is None:
        number, wire_type, data = unknown[0].field_number, unknown[0].wire_type, unknown[0].data
        if (number, wire_type) == (_DOUBLE, _FIXED64):
            return float(struct.unpack("<d", struct.pack("<Q", data))[0])
        if (number, wire_type) == (_UINT64, _VARINT):
            return int(data)
    raise BadRequest(
        f"{where}: must hold one of bool_param, int64_param, string_param, double_param or uint64_param", param=name
    )


def encode(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """``parameters`` as KServe turns them into a message: numbers it has no field for are put on the wire here."""
    return {name: _unknown_to_kserve(value) for name, value in parameters.items()}


def _unknown_to_kserve(value: Any) -> Any:
    if isinstance(value, float):
        return pb.InferParameter.FromString(bytes([_DOUBLE << 3 | _FIXED64]) + struct.pack("<d", value))
    if isinstance(value, int) and _INT64_MAX < value <= _UINT64_MAX:
        return pb.InferParameter.FromString(bytes([_UINT64 << 3 | _VARINT, *_varint(value)]))
    return value


def _varint(value: int) -> Iterable[int]:
    while value > 0x7F:
        yield value & 0x7F | 0x80
        value >>= 7
    yield value
