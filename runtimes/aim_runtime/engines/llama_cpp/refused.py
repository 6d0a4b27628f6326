"""What OpenAI's or vLLM's requests may ask and this engine cannot do: known by name, so that it is never ignored."""

from __future__ import annotations

from typing import Annotated, Any, Union

from pydantic import BaseModel, BeforeValidator, ConfigDict
from pydantic_core import PydanticCustomError

UNSUPPORTED = "unsupported_field"


def _only(*neutral: Any) -> BeforeValidator:
    """Take nothing but null and the values that ask for nothing."""

    def check(value: Any) -> Any:
        if value is None or value in neutral:
            return value
        raise PydanticCustomError(UNSUPPORTED, "is not supported by the embedded engine: leave it out")

    kinds = (None, *(type(value) for value in neutral))
    return BeforeValidator(check, json_schema_input_type=Union[kinds])  # noqa: UP007  of a tuple


class UnsupportedFields(BaseModel):
    """Each would change the answer, or what is told of it, in a way this engine cannot."""

    model_config = ConfigDict(strict=True, frozen=True)

    allowed_token_ids: Annotated[Any, _only([])] = None
    audio: Annotated[Any, _only()] = None
    bad_words: Annotated[Any, _only([])] = None
    best_of: Annotated[Any, _only(1)] = None
    cache_salt: Annotated[Any, _only()] = None
    chat_template: Annotated[Any, _only()] = None
    documents: Annotated[Any, _only([])] = None
    ec_transfer_params: Annotated[Any, _only()] = None
    function_call: Annotated[Any, _only("none")] = None
    functions: Annotated[Any, _only([])] = None
    grammar: Annotated[Any, _only()] = None
    guided_choice: Annotated[Any, _only()] = None
    guided_grammar: Annotated[Any, _only()] = None
    guided_json: Annotated[Any, _only()] = None
    guided_regex: Annotated[Any, _only()] = None
    include_reasoning: Annotated[Any, _only(True)] = None
    include_stop_str_in_output: Annotated[Any, _only(False)] = None
    json_schema: Annotated[Any, _only()] = None
    kv_transfer_params: Annotated[Any, _only()] = None
    length_penalty: Annotated[Any, _only(1)] = None
    logprob_token_ids: Annotated[Any, _only([])] = None
    media_io_kwargs: Annotated[Any, _only({})] = None
    mm_processor_kwargs: Annotated[Any, _only({})] = None
    modalities: Annotated[Any, _only(["text"])] = None
    prompt_embeds: Annotated[Any, _only()] = None
    prompt_logprobs: Annotated[Any, _only()] = None
    reasoning_effort: Annotated[Any, _only()] = None
    repetition_detection: Annotated[Any, _only()] = None
    return_prompt_text: Annotated[Any, _only(False)] = None
    return_token_ids: Annotated[Any, _only(False)] = None
    return_token_offsets: Annotated[Any, _only(False)] = None
    return_tokens_as_token_ids: Annotated[Any, _only(False)] = None
    routed_experts_prompt_start: Annotated[Any, _only(0)] = None
    skip_special_tokens: Annotated[Any, _only(True)] = None
    spaces_between_special_tokens: Annotated[Any, _only(True)] = None
    stream_interval: Annotated[Any, _only(1)] = None
    structured_outputs: Annotated[Any, _only()] = None
    suffix: Annotated[Any, _only("")] = None
    thinking_token_budget: Annotated[Any, _only(-1)] = None
    truncate_prompt_tokens: Annotated[Any, _only(-1)] = None
    truncation_side: Annotated[Any, _only()] = None
    use_beam_search: Annotated[Any, _only(False)] = None
    verbosity: Annotated[Any, _only("medium")] = None
    vllm_xargs: Annotated[Any, _only({})] = None
    watermarking: Annotated[Any, _only(False)] = None
    web_search_options: Annotated[Any, _only()] = None
