"""OpenAI bodies become generations; whatever cannot be honoured is refused by name, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from aim_kserve.errors import BadRequest
from aim_runtime.engines.base import Json

from .sampling import SamplingParams

_MAX_LOGPROBS = 20
_SEED_RANGE = 2**63
#: One wrong item is enough: describing thousands takes seconds.
_TokenIds = Annotated[list[int], Field(fail_fast=True)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchema(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)

    name: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class GenerationBody(BaseModel):
    """The fields that chat and text completions share. Fields not named here are ignored, as vLLM does."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
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


class ChatBody(GenerationBody):
    messages: Annotated[list[dict[str, Any]], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=_MAX_LOGPROBS)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def answer_tokens(self) -> tuple[str, int | None]:
        """The field that limits the answer, and its value."""
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return "max_tokens", self.max_tokens

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
    logprobs: Annotated[int, Field(ge=0, le=_MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        tokens = [token for token in prompt if isinstance(token, int)]
        return [tokens] if tokens else [item for item in prompt if not isinstance(item, int)]


class TokenizeBody(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)

    prompt: str | None = None
    messages: Annotated[list[dict[str, Any]], Field(min_length=1, fail_fast=True)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeBody(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)

    tokens: _TokenIds


#: Fields that change the answer in a way this engine cannot, with the values that ask for nothing.
_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "allowed_token_ids": (None, []),
    "audio": (None,),
    "bad_words": (None, []),
    "best_of": (None, 1),
    "chat_template": (None,),
    "continue_final_message": (None, False),
    "documents": (None, []),
    "function_call": (None, "none"),
    "functions": (None, []),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "include_stop_str_in_output": (None, False),
    "length_penalty": (None, 1, 1.0),
    "modalities": (None, ["text"]),
    "prompt_embeds": (None,),
    "prompt_logprobs": (None,),
    "skip_special_tokens": (None, True),
    "structured_outputs": (None,),
    "suffix": (None, ""),
    "truncate_prompt_tokens": (None,),
    "use_beam_search": (None, False),
    "web_search_options": (None,),
}


Body = TypeVar("Body", bound=BaseModel)


def parse(kind: type[Body], body: Json) -> Body:
    """The body as ``kind``.

    Raises:
        BadRequest: a field is missing, has a wrong type or value, or cannot be honoured; ``param`` names it.
    """
    for field, neutral in _UNSUPPORTED.items():
        if field in body and body[field] not in neutral:
            raise BadRequest(
                f"'{field}' is not supported by the embedded engine: leave it out",
                param=field,
                code="unsupported_field",
            )
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
    path, worst = max(faults, key=lambda fault: fault[0].count(".") + fault[0].count("["))
    if worst["type"] == "missing":
        return BadRequest(f"'{path}' is required", param=path)
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
        if not key.isascii() or not key.isdigit():
            raise BadRequest(f"'logit_bias' has the key {key!r}: keys are token ids", param="logit_bias")
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
