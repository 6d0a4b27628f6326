"""OpenAI bodies become generations; whatever cannot be honoured is refused by name, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from aim_kserve.errors import BadRequest
from aim_runtime.engines.base import Json

from .refused import UNSUPPORTED, UnsupportedFields
from .sampling import SamplingParams

_MAX_LOGPROBS = 20
_SEED_RANGE = 2**63
_DIGITS = 18  # of a key that is a token id: Python refuses to read thousands
#: One wrong item is enough: describing thousands takes seconds.
_TokenIds = Annotated[list[int], Field(fail_fast=True)]


class _Options(BaseModel):
    """What stands inside a field: a key nobody knows there is a mistake, as the field is in use."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class StreamOptions(_Options):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Literal[False] | None = None

    @model_validator(mode="after")
    def _belong_together(self) -> Self:
        if self.continuous_usage_stats and not self.include_usage:
            raise _needs("stream_options.continuous_usage_stats", "'stream_options.include_usage': true")
        return self


class JsonSchema(_Options):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(_Options):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class GenerationBody(UnsupportedFields):
    """The fields that chat and text completions share. Fields not named here are the server's to judge."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)

    model: str | None = None
    user: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None  # beyond, float32 overflows
    repeat_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    seed: Annotated[int, Field(ge=-_SEED_RANGE, lt=_SEED_RANGE)] | None = None
    logit_bias: dict[str, Any] | None = None  # see check_common
    stop: str | Annotated[list[str], Field(fail_fast=True)] | None = None
    stop_token_ids: _TokenIds | None = None
    ignore_eos: bool | None = None
    response_format: ResponseFormat | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def answer_tokens(self) -> tuple[str, int | None]:
        """The field that limits the answer, and its value."""
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return "max_tokens", self.max_tokens


class ChatFields(BaseModel):
    """How messages become a prompt."""

    model_config = ConfigDict(strict=True, frozen=True)

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _either_new_or_continued(self) -> Self:
        if self.continue_final_message and self.add_generation_prompt:
            raise _needs("continue_final_message", "'add_generation_prompt': false")
        return self


class ChatBody(GenerationBody, ChatFields):
    messages: Annotated[list[dict[str, Any]], Field(min_length=1, fail_fast=True)]
    echo: Literal[False] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=_MAX_LOGPROBS)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _need_their_partners(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise _needs("top_logprobs", "'logprobs': true")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise _needs("tool_choice", "'tools'")
        return self

    @property
    def top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(GenerationBody):
    prompt: (
        str
        | Annotated[list[str], Field(fail_fast=True)]
        | _TokenIds
        | Annotated[list[_TokenIds], Field(fail_fast=True)]
    )
    max_tokens: Annotated[int, Field(ge=0)] | None = None  # 0 with echo: the prompt's own log probabilities
    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=_MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None

    @model_validator(mode="after")
    def _answers_something(self) -> Self:
        field, limit = self.answer_tokens
        if limit == 0 and not self.echo:
            raise _needs(field, "'echo': true", value=" 0")
        return self

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        tokens = [token for token in prompt if isinstance(token, int)]
        return [tokens] if tokens else [item for item in prompt if not isinstance(item, int)]


class TokenizeBody(UnsupportedFields, ChatFields):
    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[dict[str, Any]], Field(min_length=1, fail_fast=True)] | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)

    model: str | None = None
    tokens: _TokenIds


#: Operation → the model of its body.
REQUESTS: Mapping[str, type[BaseModel]] = {
    "chat/completions": ChatBody,
    "completions": CompletionBody,
    "tokenize": TokenizeBody,
    "detokenize": DetokenizeBody,
}


def _needs(field: str, partner: str, *, value: str = "") -> PydanticCustomError:
    """A field that means nothing without another. ``field`` is its whole path."""
    return PydanticCustomError(
        _ALONE, "'{field}'{value} needs {partner}", {"field": field, "partner": partner, "value": value}
    )


_ALONE = "needs_partner"
Body = TypeVar("Body", bound=BaseModel)


def parse(kind: type[Body], body: Json) -> Body:
    """The body as ``kind``.

    Raises:
        BadRequest: a field is missing, has a wrong type or value, or cannot be honoured; ``param`` names it.
    """
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise _named(error, body) from None


def _named(error: ValidationError, body: Json) -> BadRequest:
    """The deepest fault, by the path a client would write. Where a field may be several things, all are told."""
    faults = [
        (_path(fault["loc"], body, missing=fault["type"] == "missing"), fault)
        for fault in error.errors(include_url=False)
    ]
    path, worst = max(
        faults, key=lambda fault: (fault[1]["type"] == UNSUPPORTED, fault[0].count(".") + fault[0].count("["))
    )
    if worst["type"] == "missing":
        return BadRequest(f"'{path}' is required", param=path)
    if worst["type"] == UNSUPPORTED:
        return BadRequest(f"'{path}' {worst['msg']}", param=path, code=UNSUPPORTED)
    if worst["type"] == _ALONE:
        return BadRequest(worst["msg"], param=worst["ctx"]["field"])
    if worst["type"] == "extra_forbidden":
        return BadRequest(f"'{path}' is no field of '{path.rpartition('.')[0]}': leave it out", param=path)
    reasons = list(dict.fromkeys(fault["msg"].removeprefix("Input ") for at, fault in faults if at == path))
    value = repr(worst["input"])
    shown = value if len(value) <= 80 else value[:77] + "..."
    return BadRequest(f"'{path}' {' or '.join(reasons)}; got {shown}", param=path)


def _path(location: tuple[int | str, ...], body: Any, *, missing: bool) -> str:
    """``messages[0].content``. Pydantic also puts the names of union members in the path; they lead nowhere."""
    path, node = "", body
    for left, part in zip(range(len(location) - 1, -1, -1), location, strict=True):
        if isinstance(part, int) and isinstance(node, list):
            path, node = f"{path}[{part}]", node[part] if part < len(node) else None
        elif isinstance(node, dict) and (part in node or (missing and not left)):
            path, node = f"{path}.{part}" if path else str(part), node.get(str(part))
    return path


def check_common(body: GenerationBody, *, slots: int, vocabulary_size: int) -> None:
    """What a field's type alone cannot say.

    Raises:
        BadRequest: naming the field.
    """
    if body.choices > slots:
        raise BadRequest(f"'n' is {body.n} but the engine runs {slots} sequences: ask for at most {slots}", param="n")
    if body.stream_options is not None and not body.stream:
        raise BadRequest("'stream_options' needs 'stream': true", param="stream_options")
    if any(not stop for stop in body.stops):
        raise BadRequest("'stop' holds an empty string, which every answer contains", param="stop")
    for token in body.stop_token_ids or ():
        _check_token(token, vocabulary_size, "stop_token_ids")
    for key, bias in (body.logit_bias or {}).items():
        if not key.isascii() or not key.isdigit() or len(key) > _DIGITS:
            raise BadRequest(f"'logit_bias' has the key {key[:80]!r}: keys are token ids", param="logit_bias")
        _check_token(int(key), vocabulary_size, "logit_bias")
        if isinstance(bias, bool) or not isinstance(bias, (int, float)) or not -100 <= bias <= 100:
            at = f"logit_bias.{key}"
            raise BadRequest(f"'{at}' is {repr(bias)[:80]}: a bias is a number from -100 to 100", param=at)


def _check_token(token: int, vocabulary_size: int, param: str) -> None:
    if not 0 <= token < vocabulary_size:
        raise BadRequest(
            f"'{param}' has token {token}: the model's token ids go from 0 to {vocabulary_size - 1}", param=param
        )


def check_prompts(prompts: Sequence[str | list[int]], vocabulary_size: int, *, param: str = "prompt") -> None:
    """Refuse empty prompts and tokens the model does not have."""
    if not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise BadRequest(f"'{param}' is empty: give at least one token of text", param=param)
    for prompt in prompts:
        for token in prompt if not isinstance(prompt, str) else ():
            _check_token(token, vocabulary_size, param)


def sampling_of(body: GenerationBody) -> SamplingParams:
    """Defaults are OpenAI's and vLLM's: temperature 1, everything else off."""
    repetition = body.repetition_penalty if body.repetition_penalty is not None else body.repeat_penalty
    return SamplingParams(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(0, body.top_k or 0),
        min_p=body.min_p or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=1.0 if repetition is None else repetition,
        logit_bias=tuple((int(key), bias) for key, bias in (body.logit_bias or {}).items()),
        seed=body.seed,
    )
