"""The messages of Envoy's external processor that we read and write, by their numbers on the wire.

https://www.envoyproxy.io/docs/envoy/latest/api-v3/service/ext_proc/v3/external_processor.proto (Apache-2.0). Built here
and not taken from a package of Envoy's protos, which brings other packages' files along (``opentelemetry/__init__``).
Their own package name keeps them apart from such a package where there is one; gRPC sends no names of messages.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote_to_bytes

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

METHOD = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"
_PACKAGE = "aim.ext_proc"
_FIELD = descriptor_pb2.FieldDescriptorProto
_KINDS = {
    "bytes": _FIELD.TYPE_BYTES,
    "string": _FIELD.TYPE_STRING,
    "bool": _FIELD.TYPE_BOOL,
    "int32": _FIELD.TYPE_INT32,  # enums too
}

#: Message → field → (number, kind); ``*`` before a kind: repeated, ``|``: one of the message's alternatives.
_MESSAGES: dict[str, dict[str, tuple[int, str]]] = {
    "HeaderValue": {"key": (1, "string"), "value": (2, "string"), "raw_value": (3, "bytes")},
    "HeaderMap": {"headers": (1, "*HeaderValue")},
    "HeaderValueOption": {"header": (1, "HeaderValue"), "append_action": (3, "int32")},
    "HeaderMutation": {"set_headers": (1, "*HeaderValueOption"), "remove_headers": (2, "*string")},
    "HttpHeaders": {"headers": (1, "HeaderMap"), "end_of_stream": (3, "bool")},
    "HttpBody": {"body": (1, "bytes"), "end_of_stream": (2, "bool")},
    "HttpTrailers": {"trailers": (1, "HeaderMap")},
    "ProcessingRequest": {
        "request_headers": (2, "|HttpHeaders"),
        "response_headers": (3, "|HttpHeaders"),
        "request_body": (4, "|HttpBody"),
        "response_body": (5, "|HttpBody"),
        "request_trailers": (6, "|HttpTrailers"),
        "response_trailers": (7, "|HttpTrailers"),
    },
    "BodyMutation": {"body": (1, "|bytes"), "clear_body": (2, "|bool")},
    "CommonResponse": {
        "status": (1, "int32"),
        "header_mutation": (2, "HeaderMutation"),
        "body_mutation": (3, "BodyMutation"),
    },
    "HeadersResponse": {"response": (1, "CommonResponse")},
    "BodyResponse": {"response": (1, "CommonResponse")},
    "TrailersResponse": {"header_mutation": (1, "HeaderMutation")},
    "HttpStatus": {"code": (1, "int32")},
    "ImmediateResponse": {
        "status": (1, "HttpStatus"),
        "headers": (2, "HeaderMutation"),
        "body": (3, "bytes"),
        "details": (5, "string"),
    },
    "ProcessingMode": {
        "request_header_mode": (1, "int32"),
        "response_header_mode": (2, "int32"),
        "request_body_mode": (3, "int32"),
        "response_body_mode": (4, "int32"),
    },
    "ProcessingResponse": {
        "request_headers": (1, "|HeadersResponse"),
        "response_headers": (2, "|HeadersResponse"),
        "request_body": (3, "|BodyResponse"),
        "response_body": (4, "|BodyResponse"),
        "request_trailers": (5, "|TrailersResponse"),
        "response_trailers": (6, "|TrailersResponse"),
        "immediate_response": (7, "|ImmediateResponse"),
        "mode_override": (9, "ProcessingMode"),
    },
}

Headers = list[tuple[bytes, bytes]]

#: ``ProcessingMode``: what of a body Envoy sends.
BODY_NONE, BODY_STREAMED, BODY_BUFFERED = 0, 1, 2
#: ``ProcessingMode``: a header mode is always given, or Envoy's default.
HEADERS_SEND = 1
#: ``HeaderValueOption.append_action``: whether a header joins those of its name, or stands in their place.
APPEND, OVERWRITE = 0, 2


def _file() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(name="aim/ext_proc.proto", package=_PACKAGE, syntax="proto3")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, (number, kind) in fields.items():
            made = message.field.add(name=field, number=number, label=_FIELD.LABEL_OPTIONAL)
            if kind.startswith("*"):
                made.label = _FIELD.LABEL_REPEATED
            if kind.startswith("|"):
                made.oneof_index = 0
            plain = kind.lstrip("*|")
            if plain in _KINDS:
                made.type = _KINDS[plain]
            else:
                made.type, made.type_name = _FIELD.TYPE_MESSAGE, f".{_PACKAGE}.{plain}"
        if any(kind.startswith("|") for _, kind in fields.values()):
            message.oneof_decl.add(name="is")
    return file


_POOL = descriptor_pool.DescriptorPool()
_POOL.Add(_file())


def _message(name: str) -> Any:
    return message_factory.GetMessageClass(_POOL.FindMessageTypeByName(f"{_PACKAGE}.{name}"))


HeaderMutation = _message("HeaderMutation")
ProcessingRequest = _message("ProcessingRequest")
ProcessingResponse = _message("ProcessingResponse")


def headers_of(message: Any) -> Headers:
    """The headers of an ``HttpHeaders``, pseudo-headers (``:path``) among them; names in lower case."""
    return [(item.key.lower().encode(), item.raw_value or item.value.encode()) for item in message.headers.headers]


def mutation(before: Headers, after: Headers) -> Any:
    """What turns one list of headers into the other."""
    made = HeaderMutation()
    kept = {name for name, _ in after}
    made.remove_headers.extend(dict.fromkeys(name.decode("latin-1") for name, _ in before if name not in kept))
    for name in dict.fromkeys(name for name, _ in after):
        values = [value for key, value in after if key == name]
        if values != [value for key, value in before if key == name]:
            for at, value in enumerate(values):
                option = made.set_headers.add(append_action=APPEND if at else OVERWRITE)
                option.header.key, option.header.raw_value = name.decode("latin-1"), value
    return made


def unquoted(path: bytes) -> str:
    """ASGI's ``path``: percent signs taken out of it once."""
    return unquote_to_bytes(path).decode("utf-8", "replace")
