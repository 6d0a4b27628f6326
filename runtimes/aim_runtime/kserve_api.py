"""KServe's V1 and V2 protocols in terms of OpenAI's: questions in, answers out. Pure.

V1: ``{"instances": ["prompt" | {"prompt": …, …} | {"messages": […], …}], "parameters": {…}}`` is answered by
``{"predictions": […]}`` in the form of each instance: text for text, ``{"text", "finish_reason", "usage"}`` for an
object. V2: the BYTES tensor ``prompt`` of shape [n] is answered by the BYTES tensors ``text`` and ``finish_reason``
of shape [n]. Generation parameters go in ``parameters``, by OpenAI's names: those of the engine's request models
(``Engine.requests``), whose values the engine checks. Where a client can send scalars only, JSON text stands for the
rest.
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
from aim_kserve.kserve import InferInput, InferOutput, InferRequest, InferResponse
from aim_runtime.engines.base import Json
from aim_runtime.fields import Fields, Kinds, nearest, shown, takes

INPUTS: list[Json] = [{"name": "prompt", "datatype": "BYTES", "shape": [-1]}]
OUTPUTS: list[Json] = [
    {"name": "text", "datatype": "BYTES", "shape": [-1]},
    {"name": "finish_reason", "datatype": "BYTES", "shape": [-1]},
]

MAX_QUESTIONS = 1024  #: prompts in one request: each is a request of its own to the engine
#: What shapes an answer that V1 and V2 cannot carry, or has its own place there: it belongs to the OpenAI routes.
OPENAI_ONLY = frozenset(
    {
        *("model", "messages", "prompt", "prompt_embeds"),
        *("stream", "stream_options", "stream_interval"),
        *("n", "best_of", "echo", "suffix"),
        *("logprobs", "top_logprobs", "prompt_logprobs", "logprob_token_ids"),
        *("tools", "tool_choice", "parallel_tool_calls", "functions", "function_call"),
        *("audio", "modalities", "mm_payload", "return_mm_kwargs", "include_reasoning"),
        *("return_prompt_text", "return_token_ids", "return_token_offsets", "return_tokens_as_token_ids"),
        *("kv_transfer_params", "ec_transfer_params", "routed_experts_prompt_start", "request_id", "session_id"),
    }
)
#: V2 parameters that speak about the transport, or to Triton's sequence batcher, which a stateless model has none of.
_NOT_OURS = frozenset({"binary_data_output", "sequence_id", "sequence_start", "sequence_end"})
#: Triton's, with their own meaning: https://github.com/triton-inference-server/server/tree/main/docs/protocol
_PRIORITY, _TIMEOUT = "priority", "timeout"
#: Of a tensor: where its bytes are, and MLServer's hint that they are text.
_TENSOR_PARAMETERS = frozenset({"binary_data", "binary_data_size", "content_type"})
#: Of a V2 body. KServe's own client sends the model's name, too.
_V2_FIELDS = frozenset({"id", "inputs", "model_name", "model_version", "outputs", "parameters"})
_COMPLETIONS, _CHAT = "completions", "chat/completions"

Requests = Mapping[str, Fields | None]

#: What OpenAI's and vLLM's fields take, for an engine that does not know its own: gRPC's parameters are strings.
_USUAL: Fields = {
    **dict.fromkeys(
        ("frequency_penalty", "min_p", "presence_penalty", "repetition_penalty", "temperature", "top_p"),
        Kinds(frozenset({"number"})),
    ),
    **dict.fromkeys(
        ("max_completion_tokens", "max_tokens", "min_tokens", "seed", "top_k"), Kinds(frozenset({"integer"}))
    ),
    **dict.fromkeys(("ignore_eos", "skip_special_tokens"), Kinds(frozenset({"boolean"}))),
    **dict.fromkeys(("logit_bias", "response_format", "structured_outputs"), Kinds(frozenset({"object"}))),
    "stop": Kinds(frozenset({"string"}), (Kinds(frozenset({"string"})),)),
    "stop_token_ids": Kinds(arrays=(Kinds(frozenset({"integer"})),)),
}


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt as an OpenAI request. ``where`` names it in errors; ``plain``: the answer is bare text;
    ``timeout_s`` as in RequestContext; ``ignored``: parameters that were given and do nothing."""

    operation: str
    body: Json
    where: str
    plain: bool = True
    timeout_s: float | None = None
    ignored: tuple[str, ...] = ()


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


def read_v1(payload: Any, requests: Requests) -> list[Question]:
    """Args:
        payload: the body, parsed if KServe took it for JSON.
        requests: ``Engine.requests``.

    Raises:
        BadRequest: names the field.
    """
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
    shared = payload.get("parameters") or {}
    _check(shared, "parameters", parameters(requests, _COMPLETIONS, _CHAT))
    return [_instance(instance, shared, f"instances[{index}]", requests) for index, instance in enumerate(instances)]


def _instance(instance: Any, shared: Json, where: str, requests: Requests) -> Question:
    own = {"prompt": instance} if isinstance(instance, str) else instance
    if not isinstance(own, dict):
        raise BadRequest(f"{where}: must be a string or an object, not {_kind(instance)}", param="instances")
    given = {name for name in ("messages", "prompt") if own.get(name) is not None}
    if len(given) != 1:
        raise BadRequest(f"{where}: give either prompt or messages", param="instances")
    operation = _CHAT if "messages" in given else _COMPLETIONS
    prompt = own.get("prompt")
    if operation == _COMPLETIONS and not isinstance(prompt, str):
        raise BadRequest(f"{where}.prompt: must be a string, not {_kind(prompt)}", param="prompt")
    allowed = parameters(requests, operation)
    _check(shared, f"{where}: parameters", allowed)
    _check({name: value for name, value in own.items() if name not in ("messages", "prompt")}, where, allowed)
    everything = {**shared, **own}
    body = {name: value for name, value in everything.items() if allowed is None or name in given or name in allowed}
    return Question(operation, body, where, plain=isinstance(instance, str))


def write_v1(answers: list[Answer]) -> Json:
    return {"predictions": [answer.text if answer.question.plain else _object(answer) for answer in answers]}


def _object(answer: Answer) -> Json:
    return {"text": answer.text, "finish_reason": answer.finish_reason, "usage": answer.usage}


# --- V2 -----------------------------------------------------------------------------------------------------------


def read_v2(request: InferRequest, requests: Requests) -> list[Question]:
    """Args:
        request: its ``parameters`` as plain values.
        requests: ``Engine.requests``.

    Raises:
        BadRequest: names the tensor or the parameter.
    """
    _check(dict.fromkeys(getattr(request, "unknown_fields", ())), "the body", _V2_FIELDS)
    _check_tensors(request)
    given = request.parameters or {}
    _check(given, "parameters", parameters(requests, _COMPLETIONS), beside=_NOT_OURS | {_PRIORITY, _TIMEOUT})
    fields = requests.get(_COMPLETIONS, {})
    shared = {
        name: _meant(_USUAL if fields is None else fields, name, value, scalars=bool(request.from_grpc))
        for name, value in given.items()
        if name not in _NOT_OURS and name not in (_PRIORITY, _TIMEOUT)
    }
    timeout_s = _triton_timeout_s(given)
    # Who goes first is not for the client to say: a level above 1 asks for what it does not get.
    ignored = (_PRIORITY,) if _unsigned(given, _PRIORITY) > 1 else ()
    return [
        Question(_COMPLETIONS, {**shared, "prompt": prompt}, f"prompt[{index}]", timeout_s=timeout_s, ignored=ignored)
        for index, prompt in enumerate(_prompts(request.inputs[0]))
    ]


def _check_tensors(request: InferRequest) -> None:
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
    for tensor in (*request.inputs, *(request.request_outputs or ())):
        _check(tensor.parameters or {}, f"tensor {tensor.name!r}: parameters", _TENSOR_PARAMETERS)


def _meant(fields: Fields | None, name: str, value: Any, *, scalars: bool) -> Any:
    """The value that a string stands for: a list or an object as JSON text, where the field takes one; with
    ``scalars`` also a number or a boolean, where the field takes no text (KServe's gRPC client has no floats)."""
    if not isinstance(value, str) or name not in (fields or {}):
        return value
    try:
        parsed = orjson.loads(value)
    except orjson.JSONDecodeError:
        return value  # e.g. a stop string that begins with a bracket
    if not isinstance(parsed, (dict, list)):
        return parsed if scalars and not takes(fields, name, value) else value
    return parsed if takes(fields, name, parsed) or not takes(fields, name, value) else value


def _triton_timeout_s(given: Mapping[str, Any]) -> float | None:
    """Triton's ``timeout`` is in microseconds, 0 is none."""
    return _unsigned(given, _TIMEOUT) / 1e6 or None


def _unsigned(given: Mapping[str, Any], name: str) -> int:
    value = given.get(name, 0)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise BadRequest(f"parameters.{name}: must be an integer >= 0 (got {value!r})", param=name)
    return value


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
            f"input 'prompt': byte {offset} of the binary data: not a 4-byte length and that many bytes: "
            "this is not a V2 inference request",
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


def parameters(requests: Requests, *operations: str) -> frozenset[str] | None:
    """What may stand in ``parameters`` for one of these operations; for one that the engine lacks (it will be told so),
    what may for any. None: everything, as the engine does not know its fields."""
    asked = [requests[name] for name in operations if name in requests]
    known = asked if len(asked) == len(operations) else list(requests.values())
    if None in known:
        return None
    names = {name for fields in known for name in fields or ()}
    return frozenset(names - OPENAI_ONLY)


def _check(
    given: Any, where: str, known: frozenset[str] | None, *, beside: frozenset[str] | set[str] = frozenset()
) -> None:
    if not isinstance(given, Mapping):
        raise BadRequest(f"{where}: must be an object, not {_kind(given)}", param=where)
    if known is None:
        known, unknown = frozenset(), next((name for name in given if name in OPENAI_ONLY), None)
    else:
        known |= beside
        unknown = next((name for name in given if name not in known), None)
    if unknown is None:
        return
    near = nearest(unknown, known)
    if unknown in OPENAI_ONLY:
        remedy = "it shapes an answer that this protocol cannot carry: use the OpenAI routes"
    else:
        remedy = f"did you mean {near}?" if near else f"known: {', '.join(sorted(known))}"
    raise BadRequest(f"{where}.{shown(unknown)}: unknown parameter; {remedy}", param=shown(unknown))


def _kind(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}.get(
        type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__
    )
