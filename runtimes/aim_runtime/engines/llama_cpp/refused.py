"""What OpenAI's or vLLM's requests may ask and this engine cannot do: known by name, so that it is never ignored."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict
from pydantic_core import PydanticCustomError

UNSUPPORTED = "unsupported_field"


def _only(*neutral: Any) -> Any:
    """A field that takes nothing but null and the values that ask for nothing."""

    def check(value: Any) -> Any:
        if value is None or value in neutral:
            return value
        raise PydanticCustomError(UNSUPPORTED, "is not supported by the embedded engine: leave it out")

    return Annotated[Any, BeforeValidator(check)]


class UnsupportedFields(BaseModel):
    """Each would change the answer, or what is told of it, in a way this engine cannot."""

    model_config = ConfigDict(strict=True, frozen=True)

    allowed_token_ids: _only([]) = None
    audio: _only() = None
    bad_words: _only([]) = None
    best_of: _only(1) = None
    cache_salt: _only() = None
    chat_template: _only() = None
    documents: _only([]) = None
    ec_transfer_params: _only() = None
    function_call: _only("none") = None
    functions: _only([]) = None
    grammar: _only() = None
    guided_choice: _only() = None
    guided_grammar: _only() = None
    guided_json: _only() = None
    guided_regex: _only() = None
    include_reasoning: _only(True) = None
    include_stop_str_in_output: _only(False) = None
    json_schema: _only() = None
    kv_transfer_params: _only() = None
    length_penalty: _only(1) = None
    logprob_token_ids: _only([]) = None
    media_io_kwargs: _only({}) = None
    mm_processor_kwargs: _only({}) = None
    modalities: _only(["text"]) = None
    prompt_embeds: _only() = None
    prompt_logprobs: _only() = None
    reasoning_effort: _only() = None
    repetition_detection: _only() = None
    return_prompt_text: _only(False) = None
    return_token_ids: _only(False) = None
    return_token_offsets: _only(False) = None
    return_tokens_as_token_ids: _only(False) = None
    routed_experts_prompt_start: _only(0) = None
    skip_special_tokens: _only(True) = None
    spaces_between_special_tokens: _only(True) = None
    stream_interval: _only(1) = None
    structured_outputs: _only() = None
    suffix: _only("") = None
    thinking_token_budget: _only(-1) = None
    truncate_prompt_tokens: _only(-1) = None
    truncation_side: _only() = None
    use_beam_search: _only(False) = None
    verbosity: _only("medium") = None
    vllm_xargs: _only({}) = None
    watermarking: _only(False) = None
    web_search_options: _only() = None
