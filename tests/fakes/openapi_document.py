"""What both processes promise on their routes, as an OpenAPI document: requests as clients send them, statuses and
shapes of the answers. An engine's own fields are open: bodies travel as received.
"""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]

TEXT: Json = {"type": "string", "maxLength": 40}
NAME: Json = {"type": "string", "enum": ["m", "M", "other", "a/b", "ä ö", "%00", ".."]}
NUMBER: Json = {"type": "number", "minimum": -3, "maximum": 3}
COUNT: Json = {"type": "integer", "minimum": -1, "maximum": 8}
ANYTHING: Json = {}


def an_object(required: list[str], **properties: Json) -> Json:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": True}


def a_list(items: Json, most: int = 3) -> Json:
    return {"type": "array", "items": items, "maxItems": most}


OPENAI_ERROR = an_object(
    ["error"],
    error={
        **an_object(
            ["message", "type", "param", "code"],
            message={"type": "string", "minLength": 1},
            type={"type": "string", "minLength": 1},
            param={"type": ["string", "null"]},
            code={"type": ["string", "integer", "null"]},
        ),
    },
)
KSERVE_ERROR = an_object(["error"], error={"type": "string", "minLength": 1})

SAMPLING: dict[str, Json] = {
    "model": NAME,
    "max_tokens": COUNT,
    "temperature": NUMBER,
    "top_p": NUMBER,
    "n": COUNT,
    "seed": {"type": "integer"},
    "stop": {"anyOf": [TEXT, a_list(TEXT), {"type": "null"}]},
    "stream": {"type": ["boolean", "null"]},
    "stream_options": an_object([], include_usage={"type": "boolean"}),
    "user": TEXT,
    "metadata": ANYTHING,
}
PART = an_object(["type"], type={"enum": ["text", "image_url"]}, text=TEXT, image_url=an_object([], url=TEXT))
CALL = an_object(
    ["id", "function"], id=TEXT, type=TEXT, function=an_object(["name", "arguments"], name=TEXT, arguments=TEXT)
)
MESSAGE = an_object(
    ["role"],
    role={"enum": ["system", "user", "assistant", "tool", "nobody"]},
    content={"anyOf": [TEXT, a_list(PART), {"type": "null"}]},
    tool_calls=a_list(CALL),
)
TENSOR = an_object(
    ["name", "shape", "datatype"],
    name={"enum": ["prompt", "other"]},
    shape=a_list({"type": "integer", "minimum": -2, "maximum": 4}),
    datatype={"enum": ["BYTES", "FP32", "INT64", "BOOL", "NONE"]},
    data=a_list({"anyOf": [TEXT, {"type": "integer"}, {"type": "boolean"}, a_list(TEXT)]}),
    parameters=an_object([], binary_data_size=COUNT),
)
PROMPT: Json = {"anyOf": [TEXT, a_list(TEXT), a_list(COUNT), a_list(a_list(COUNT)), {"type": "null"}]}
INSTANCE: Json = {"anyOf": [TEXT, an_object(["prompt"], prompt=PROMPT), an_object([], messages=a_list(MESSAGE)), COUNT]}

BODIES: dict[str, Json] = {
    "/v1/chat/completions": an_object(["messages"], messages=a_list(MESSAGE), **SAMPLING),
    "/openai/v1/completions": an_object(["prompt"], prompt=PROMPT, **SAMPLING),
    "/v1/embeddings": an_object(["input"], input=PROMPT, model=NAME),
    "/v1/responses": an_object(
        ["input"], input={"anyOf": [TEXT, a_list(MESSAGE)]}, model=NAME, stream=SAMPLING["stream"]
    ),
    "/v1/tokenize": an_object([], prompt=PROMPT, messages=a_list(MESSAGE)),
    "/v1/models/{name}:predict": an_object(
        ["instances"], instances=a_list(INSTANCE), parameters=an_object([], **SAMPLING)
    ),
    "/v1/models/{name}:explain": an_object(["instances"], instances=a_list(INSTANCE)),
    "/v2/models/{name}/infer": an_object(
        ["inputs"],
        id=TEXT,
        inputs=a_list(TENSOR, 2),
        outputs=a_list(an_object(["name"], name={"enum": ["text", "finish_reason", "x"]})),
        parameters=an_object([], **SAMPLING),
    ),
    "/v2/repository/models/{name}/load": an_object([]),
    "/v2/repository/models/{name}/unload": an_object([]),
}
GETS = (
    *("/", "/metrics", "/openapi.json", "/v1/models", "/openai/v1/models", "/v1/models/{name}", "/v2", "/v2/models"),
    *("/v2/health/live", "/v2/health/ready", "/v2/models/{name}", "/v2/models/{name}/ready"),
)


def speaks_openai(path: str) -> bool:
    return path.startswith(("/v1/", "/openai/")) and not path.endswith((":predict", ":explain"))


def document() -> Json:
    """The whole document, OpenAPI 3.1."""
    paths: Json = {}
    for path in GETS:
        paths.setdefault(path, {})["get"] = _operation(path, None)
    for path, body in BODIES.items():
        paths.setdefault(path, {})["post"] = _operation(path, body)
    return {"openapi": "3.1.0", "info": {"title": "aim-kserve", "version": "1"}, "paths": paths}


def _operation(path: str, body: Json | None) -> Json:
    kinds = ["application/json", *(["text/event-stream"] if speaks_openai(path) else [])]
    answers = {kind: {"schema": ANYTHING} for kind in kinds} if path != "/metrics" else {"text/plain": {}}
    failure = {"application/json": {"schema": OPENAI_ERROR if speaks_openai(path) else KSERVE_ERROR}}
    operation: Json = {
        "responses": {
            "200": {"description": "answered", "content": answers},
            **{
                status: {"description": "refused", "content": failure}
                for status in ("400", "404", "405", "408", "413", "415", "429", "501", "502", "503")
            },
        }
    }
    if "{name}" in path:
        operation["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": NAME}]
    if path.endswith("/infer"):
        length = {
            "name": "inference-header-content-length",
            "in": "header",
            "schema": {"type": "string", "maxLength": 4},
        }
        operation["parameters"].append(length)
    if body is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    return operation
