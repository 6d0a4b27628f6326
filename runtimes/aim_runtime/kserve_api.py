"""KServe's V1 and V2 protocols in terms of OpenAI's: questions in, answers out. Pure.

V1: ``{"instances": ["prompt" | {"prompt": …, …} | {"messages": […], …}], "parameters": {…}}`` is answered by
``{"predictions": […]}`` in the form of each instance: text for text, ``{"text", "finish_reason", "usage"}`` for an
object. V2: the BYTES tensor ``prompt`` of shape [n] is answered by the BYTES tensors ``text`` and ``finish_reason``
of shape [n]. Generation parameters go in ``parameters``, by OpenAI's names.
"""

from __future__ import annotations

import struct
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from aim_kserve.errors import BadRequest
from aim_kserve.http import parse_object
from aim_kserve.kserve import InferInput, InferOutput, InferRequest, InferResponse, to_http_parameters
from aim_runtime.engines.base import Json

INPUTS: list[Json] = [{"name": "prompt", "datatype": "BYTES", "shape": [-1]}]
OUTPUTS: list[Json] = [
    {"name": "text", "datatype": "BYTES", "shape": [-1]},
    {"name": "finish_reason", "datatype": "BYTES", "shape": [-1]},
]

MAX_QUESTIONS = 1024  #: prompts in one request: each is a request of its own to the engine
#: What may stand in ``parameters``. What shapes an answer that V1 and V2 cannot carry (n, stream, logprobs, tools)
#: belongs to the OpenAI routes. The engine checks the values.
PARAMETERS = frozenset(
    {
        "frequency_penalty",
        "ignore_eos",
        "logit_bias",
        "max_completion_tokens",
        "max_tokens",
        "min_p",
        "min_tokens",
        "presence_penalty",
        "repetition_penalty",
        "response_format",
        "seed",
        "stop",
        "stop_token_ids",
        "temperature",
        "top_k",
        "top_p",
        "user",
    }
)
#: V2 parameters are scalars: these may be given as JSON text.
STRUCTURED = frozenset({"logit_bias", "response_format", "stop", "stop_token_ids"})
#: V2 parameters that speak about the transport, not about the answer.
TRANSPORT = frozenset({"binary_data_output"})


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt as an OpenAI request. ``where`` names it in errors; ``plain``: the answer is bare text."""

    operation: str
    body: Json
    where: str
    plain: bool = True


@dataclass(frozen=True, slots=True)
class Answer:
    question: Question
    text: str
    finish_reason: str
    usage: Json | None

    @classmethod
    def of(cls, question: Question, answer: Json) -> Answer:
        choice = answer["choices"][0]
        text = choice["message"].get("content") if "message" in choice else choice["text"]
        return cls(question, text or "", choice.get("finish_reason") or "", answer.get("usage"))


# --- V1 -----------------------------------------------------------------------------------------------------------


def read_v1(payload: Any) -> list[Question]:
    """Raises BadRequest naming the field."""
    if isinstance(payload, (bytes, str)):  # a content type that KServe does not take for JSON
        payload = parse_object(payload.encode() if isinstance(payload, str) else payload)
    if not isinstance(payload, dict):
        raise BadRequest(f'the body must be an object {{"instances": [...]}}, not {_kind(payload)}')
    unknown = sorted(set(payload) - {"instances", "parameters"})
    if unknown:
        raise BadRequest(f"{unknown[0]}: unknown field; known: instances, parameters", param=unknown[0])
    instances = payload.get("instances")
    if not isinstance(instances, list) or not instances:
        raise BadRequest("instances: must be a non-empty list of prompts", param="instances")
    _check_count(len(instances), "instances")
    shared = _checked(payload.get("parameters") or {}, "parameters")
    return [_instance(instance, shared, f"instances[{index}]") for index, instance in enumerate(instances)]


def _instance(instance: Any, shared: Json, where: str) -> Question:
    if isinstance(instance, str):
        return Question("completions", {**shared, "prompt": instance}, where)
    if not isinstance(instance, dict):
        raise BadRequest(f"{where}: must be a string or an object, not {_kind(instance)}", param="instances")
    own = dict(instance)
    messages, prompt = own.pop("messages", None), own.pop("prompt", None)
    if (messages is None) == (prompt is None):
        raise BadRequest(f"{where}: give either prompt or messages", param="instances")
    body = {**shared, **_checked(own, where)}
    if messages is not None:
        return Question("chat/completions", {**body, "messages": messages}, where, plain=False)
    if not isinstance(prompt, str):
        raise BadRequest(f"{where}.prompt: must be a string, not {_kind(prompt)}", param="prompt")
    return Question("completions", {**body, "prompt": prompt}, where, plain=False)


def write_v1(answers: list[Answer]) -> Json:
    return {"predictions": [answer.text if answer.question.plain else _object(answer) for answer in answers]}


def _object(answer: Answer) -> Json:
    return {"text": answer.text, "finish_reason": answer.finish_reason, "usage": answer.usage}


# --- V2 -----------------------------------------------------------------------------------------------------------


def read_v2(request: InferRequest) -> list[Question]:
    """Raises BadRequest naming the tensor or the parameter."""
    for tensor in request.inputs:
        if tensor.name != "prompt":
            raise BadRequest(f"input {tensor.name!r}: unknown tensor; the only input is 'prompt'", param=tensor.name)
    if len(request.inputs) != 1:
        raise BadRequest(f"{len(request.inputs)} input tensors: give exactly one, 'prompt'", param="inputs")
    wanted = {output["name"] for output in OUTPUTS}
    for output in request.request_outputs or ():
        if output.name not in wanted:
            known = ", ".join(sorted(wanted))
            raise BadRequest(f"output {output.name!r}: unknown tensor; known: {known}", param=output.name)
    given = to_http_parameters(request.parameters) if request.parameters else {}
    scalars = {name: value for name, value in given.items() if name not in TRANSPORT}
    shared = {name: _structured(name, value) for name, value in _checked(scalars, "parameters").items()}
    return [
        Question("completions", {**shared, "prompt": prompt}, f"prompt[{index}]")
        for index, prompt in enumerate(_prompts(request.inputs[0]))
    ]


def _prompts(tensor: InferInput) -> list[str]:
    if tensor.datatype != "BYTES":
        raise BadRequest(f"input 'prompt': datatype must be BYTES, not {tensor.datatype}", param="prompt")
    shape = list(tensor.shape)
    if len(shape) != 1 or shape[0] < 1:
        raise BadRequest(f"input 'prompt': shape must be [n] with n >= 1, not {shape}", param="prompt")
    _check_count(shape[0], "prompt")
    elements = _elements(tensor)
    if len(elements) != shape[0]:
        raise BadRequest(f"input 'prompt': shape {shape} but {len(elements)} elements", param="prompt")
    return [_text(element, index) for index, element in enumerate(elements)]


def _elements(tensor: InferInput) -> list[Any]:
    raw = tensor._raw_data
    if raw is None:
        return list(tensor.data or ())
    elements: list[Any] = []
    offset = 0
    try:
        while offset < len(raw) and len(elements) <= MAX_QUESTIONS:
            (length,) = struct.unpack_from("<I", raw, offset)
            elements.append(struct.unpack_from(f"{length}s", raw, offset + 4)[0])
            offset += 4 + length
    except struct.error:
        raise BadRequest(
            f"input 'prompt': byte {offset} of the binary data: not a 4-byte length and that many bytes",
            param="prompt",
        ) from None
    return elements


def _text(element: Any, index: int) -> str:
    if isinstance(element, str):
        return element
    if not isinstance(element, bytes):
        raise BadRequest(f"prompt[{index}]: must be a string, not {_kind(element)}", param="prompt")
    try:
        return element.decode()
    except UnicodeDecodeError as error:
        raise BadRequest(f"prompt[{index}]: not UTF-8 at byte {error.start}", param="prompt") from None


def _structured(name: str, value: Any) -> Any:
    if name not in STRUCTURED or not isinstance(value, str) or value[:1] not in ("[", "{"):
        return value
    try:
        return orjson.loads(value)
    except orjson.JSONDecodeError:
        return value  # a stop string that begins with a bracket


def write_v2(request: InferRequest, model_name: str, answers: list[Answer]) -> InferResponse:
    columns = {
        "text": [answer.text for answer in answers],
        "finish_reason": [answer.finish_reason for answer in answers],
    }
    return InferResponse(
        response_id=request.id or str(uuid.uuid4()),
        model_name=model_name,
        infer_outputs=[
            InferOutput(name=name, shape=[len(column)], datatype="BYTES", data=column)
            for name, column in columns.items()
            if not request.from_grpc or _is_wanted(name, request)
        ],
        use_binary_outputs=request.use_binary_outputs,
        requested_outputs=request.request_outputs,
    )


def _is_wanted(name: str, request: InferRequest) -> bool:
    """KServe picks the requested outputs itself over REST but not over gRPC."""
    return not request.request_outputs or any(output.name == name for output in request.request_outputs)


# --- both ---------------------------------------------------------------------------------------------------------


def _check_count(count: int, param: str) -> None:
    if count > MAX_QUESTIONS:
        raise BadRequest(f"{param}: {count} prompts in one request; {MAX_QUESTIONS} are the most", param=param)


def _checked(parameters: Any, where: str) -> Json:
    if not isinstance(parameters, Mapping):
        raise BadRequest(f"{where}: must be an object, not {_kind(parameters)}", param=where)
    unknown = sorted(str(name) for name in parameters if name not in PARAMETERS)
    if unknown:
        raise BadRequest(
            f"{where}.{unknown[0]}: unknown parameter; known: {', '.join(sorted(PARAMETERS))}", param=unknown[0]
        )
    return dict(parameters)


def _kind(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}.get(
        type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__
    )
