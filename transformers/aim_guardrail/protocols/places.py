"""What stands where in OpenAI's and V2's bodies, of requests and answers alike.

https://platform.openai.com/docs/api-reference, and what vLLM, SGLang, Mistral and OpenRouter add;
https://github.com/kserve/open-inference-protocol. A field that is missing here is only checked more strictly: as
anybody's, its key as context for its value.
"""

from __future__ import annotations

from aim_guardrail.slots.places import BASE64, FILE, FREE, ID, JSON, LINK, NAME, SHADOW, TEXT, WORD, Kind, Place


def place_with(*places: Place, parts: bool = False, kind: Kind = Kind.TEXT, **children: Place) -> Place:
    """A place with the keys of others and its own."""
    known = {key: place for other in places for key, place in other.children.items()}
    return Place(kind, parts=parts, **{**known, **children})


#: Text that no stream sends piece by piece: names, citations, signatures.
WHOLE = Place()
WHOLE.others = WHOLE

# JSON Schema: its own words, and names of fields, which say nothing of the schemas under them.
SCHEMA = Place(type=WORD, title=TEXT, description=TEXT, format=WORD, pattern=TEXT, required=TEXT)
_NAMED_SCHEMAS = Place(others=SCHEMA)
for _key in ("items", "anyOf", "allOf", "oneOf", "not", "additionalProperties"):
    SCHEMA.children[_key] = SCHEMA
for _key in ("properties", "patternProperties", "$defs", "definitions"):
    SCHEMA.children[_key] = _NAMED_SCHEMAS

_FUNCTION = Place(
    name=WHOLE, description=TEXT, arguments=JSON, parameters=SCHEMA, strict=TEXT, output=TEXT, input_schema=SCHEMA
)
_CUSTOM = Place(name=WHOLE, description=TEXT, input=TEXT, format=Place(type=WORD, syntax=WORD, definition=TEXT))
_CALL = Place(id=ID, type=WORD, function=_FUNCTION, custom=_CUSTOM)
_TOOL = place_with(_FUNCTION, type=WORD, function=_FUNCTION, custom=_CUSTOM, server_label=TEXT, server_description=TEXT)
_CHOSEN_TOOL = place_with(_TOOL, mode=WORD, tools=_TOOL)

_SAMPLES = Place(data=BASE64, format=WORD, id=ID, transcript=TEXT, voice=WORD)
_LINK = place_with(kind=Kind.LINK, url=LINK, detail=WORD)

# Part of a message: text, a picture, sound, a file, a refusal, what was thought (Mistral), Responses' own.
_PART = Place(
    type=WORD,
    text=TEXT,
    refusal=TEXT,
    annotations=WHOLE,
    logprobs=SHADOW,
    image_url=_LINK,
    video_url=_LINK,
    audio_url=_LINK,
    detail=WORD,
    input_audio=_SAMPLES,
    file=Place(file_data=FILE, filename=WHOLE, file_id=ID),
    file_data=FILE,
    file_url=TEXT,
    filename=WHOLE,
    file_id=ID,
    summary=TEXT,
)
_CONTENT = place_with(_PART, parts=True)
_CONTENT.children["thinking"] = _CONTENT
_REASONING = Place(type=WORD, text=TEXT, summary=TEXT, data=WHOLE, id=ID, format=WORD, signature=WHOLE)

_MESSAGE = Place(
    role=WORD,
    content=_CONTENT,
    name=TEXT,
    refusal=TEXT,
    reasoning=TEXT,
    reasoning_content=TEXT,
    reasoning_details=_REASONING,
    annotations=WHOLE,
    audio=_SAMPLES,
    tool_call_id=ID,
    tool_calls=_CALL,
    function_call=_FUNCTION,
)
_CHOICE = Place(
    message=_MESSAGE,
    delta=_MESSAGE,
    text=TEXT,
    finish_reason=WORD,
    stop_reason=TEXT,
    logprobs=SHADOW,
    prompt_logprobs=SHADOW,
    token_ids=SHADOW,
    prompt_token_ids=SHADOW,
)
ERROR = Place(message=TEXT, type=WORD, code=WORD, param=TEXT)
_FORMAT = Place(type=WORD, name=TEXT, description=TEXT, schema=SCHEMA)

# What all of OpenAI's requests and answers have.
COMMON = Place(
    id=ID,
    object=WORD,
    type=WORD,
    model=ID,
    user=TEXT,
    safety_identifier=TEXT,
    prompt_cache_key=TEXT,
    cache_salt=TEXT,
    service_tier=WORD,
    system_fingerprint=ID,
    tools=_TOOL,
    tool_choice=_CHOSEN_TOOL,
    error=ERROR,
    message=TEXT,  # vLLM's errors of old
    encoding_format=WORD,
    obfuscation=ID,
    arguments=JSON,
)
CHAT = place_with(
    COMMON,
    messages=_MESSAGE,
    choices=_CHOICE,
    prompt=TEXT,
    suffix=TEXT,
    stop=TEXT,
    functions=_FUNCTION,
    function_call=_FUNCTION,
    response_format=place_with(_FORMAT, json_schema=_FORMAT),
    reasoning_effort=WORD,
    verbosity=WORD,
    modalities=WORD,
    audio=_SAMPLES,
    prediction=Place(type=WORD, content=_CONTENT),
    chat_template=TEXT,
    prompt_logprobs=SHADOW,
    prompt_token_ids=SHADOW,
)
EMBEDDINGS = place_with(COMMON, input=TEXT, data=Place(object=WORD, embedding=BASE64))

# An item of a response's input or output: a message, a call, what a tool gave.
_ITEM = Place(
    id=ID,
    type=WORD,
    role=WORD,
    status=WORD,
    content=_CONTENT,
    call_id=ID,
    name=TEXT,
    arguments=JSON,
    input=TEXT,
    output=_CONTENT,
    summary=_PART,
    encrypted_content=TEXT,
    text=TEXT,
    error=TEXT,
    server_label=TEXT,
)
RESPONSES = place_with(
    COMMON,
    status=WORD,
    input=_ITEM,
    output=_ITEM,
    instructions=_ITEM,
    prompt=Place(id=ID, version=WORD),
    previous_response_id=ID,
    conversation=place_with(kind=Kind.ID, id=ID),
    include=WORD,
    truncation=WORD,
    incomplete_details=Place(reason=WORD),
    reasoning=Place(effort=WORD, summary=WORD, generate_summary=WORD),
    text=Place(format=_FORMAT, verbosity=WORD),
)
# An event of a streamed response.
RESPONSES_EVENT = Place(
    type=WORD,
    response=RESPONSES,
    item=_ITEM,
    part=_PART,
    annotation=WHOLE,
    text=TEXT,
    delta=TEXT,
    refusal=TEXT,
    transcript=TEXT,
    arguments=JSON,
    input=TEXT,
    code=WORD,
    message=TEXT,
    param=TEXT,
    item_id=ID,
    response_id=ID,
    call_id=ID,
    obfuscation=ID,
    logprobs=SHADOW,
)

# V2: without what a client cannot read its tensors, a verdict on the whole of an answer must not change it.
_TENSOR = Place(Kind.FREE, others=FREE, name=NAME, datatype=NAME, arguments=JSON)
V2 = Place(Kind.FREE, others=FREE, model_name=ID, model_version=ID, inputs=_TENSOR, outputs=_TENSOR, arguments=JSON)
