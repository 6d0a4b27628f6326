"""What a model is, as far as memory is concerned: its dimensions and how many parameters they make.

A blank fact stays blank and says so in `ModelFacts.missing`; nothing is derived from a name.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from aim_profile.gpus.catalog import Confidence

Precision = Literal["bf16", "fp16", "fp8", "int8", "int4", "mxfp4"]
AttentionKind = Literal["full", "sliding", "chunked", "cross", "shared", "linear", "compressed"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def what_is_impossible(problem: ValidationError | ZeroDivisionError) -> str:
    """The first wrong dimension in one line: `head_dim: Input should be greater than or equal to 1 (got 0)`."""
    if isinstance(problem, ZeroDivisionError):
        return str(problem)
    first = problem.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    why = first["msg"].removeprefix("Value error, ")
    return f"{where}: {why} (got {first['input']!r:.80})" if where else why


class State(_Frozen):
    """What a layer of linear attention (Mamba-2, gated delta, Kimi's delta) keeps of a sequence, however long it is.

    conv_rows: past inputs of its short convolution, each of conv_channels values, at 16 bits; of them group_channels
    belong to each of `groups` groups, which tensor parallelism repeats rather than divides. recurrent: values of the
    recurrent state, of recurrent_bytes each. heads: what a tensor-parallel size must divide. checkpoints: states kept
    beside it while a prompt is read.
    """

    conv_rows: int = Field(ge=0)
    conv_channels: int = Field(ge=0)
    groups: int = Field(default=0, ge=0)
    group_channels: int = Field(default=0, ge=0)
    recurrent: int = Field(ge=1)
    recurrent_bytes: Literal[2, 4] = 4
    heads: int = Field(ge=1)
    checkpoints: int = Field(default=0, ge=0)


class Attention(_Frozen):
    """A group of equal layers. window: tokens kept by sliding and chunked layers, None for the others.

    `cross` layers keep keys and values of the encoder's tokens (an image), none of the text's; `shared` ones read an
    earlier layer's; `linear` ones keep a `state`. kv_heads, key_dim, value_dim: where they are not the model's.
    index_bytes: of a token's key in the layer's sparse-attention indexer, whatever the cache's dtype.
    `compressed` (DeepSeek-V4): one latent for `ratio` tokens, and the last `window` tokens' as they are.
    """

    kind: AttentionKind
    layers: int = Field(ge=1)
    window: int | None = Field(default=None, ge=1)
    kv_heads: int | None = Field(default=None, ge=1)
    key_dim: int | None = Field(default=None, ge=1)
    value_dim: int | None = Field(default=None, ge=1)
    index_bytes: int = Field(default=0, ge=0)
    ratio: Literal[1, 4, 128] | None = None
    state: State | None = None

    @model_validator(mode="after")
    def _each_where_it_belongs(self) -> Self:
        for named, value, kinds in (
            ("window", self.window, ("sliding", "chunked", "compressed")),
            ("ratio", self.ratio, ("compressed",)),
            ("state", self.state, ("linear",)),
        ):
            if (self.kind in kinds) != (value is not None):
                raise ValueError(f"{self.kind} attention: {named} is {value}")
        return self

    @property
    def plain(self) -> bool:
        """Whether these are layers of the model's own heads, without an indexer."""
        own = (self.kv_heads, self.key_dim, self.value_dim, self.state, self.ratio)
        return not self.index_bytes and own == (None,) * len(own)


class Experts(_Frozen):
    """Mixture of experts: all `count` experts stand in memory, `per_token` of them work.

    dense_layers: leading layers without experts; ffn: the intermediate size of one expert.
    """

    count: int = Field(ge=1)
    per_token: int = Field(ge=1)
    shared: int = Field(default=0, ge=0)
    ffn: int = Field(ge=1)
    dense_layers: int = Field(default=0, ge=0)


class Mla(_Frozen):
    """Multi-head latent attention (DeepSeek): one latent of kv_rank + rope_dim per token and layer."""

    kv_rank: int = Field(ge=1)
    rope_dim: int = Field(ge=1)
    nope_dim: int = Field(ge=1)
    value_dim: int = Field(ge=1)
    query_rank: int | None = Field(default=None, ge=1)


class Shape(_Frozen):
    """The dimensions of a decoder, as in config.json. vision_params: parameters of an image tower."""

    hidden: int = Field(ge=1)
    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    ffn: int = Field(ge=1)
    vocab: int = Field(ge=1)
    tied: bool
    attention: tuple[Attention, ...] = Field(min_length=1)
    experts: Experts | None = None
    mla: Mla | None = None
    vision_params: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _keeps_some_text(self) -> Self:
        if all(group.kind in ("cross", "shared") for group in self.attention):
            raise ValueError("no layer attends to the text")
        return self

    @property
    def layers(self) -> int:
        """Decoder layers of every kind."""
        return sum(group.layers for group in self.attention)

    @property
    def self_attention_layers(self) -> int:
        """Layers that keep keys and values of the text."""
        return sum(group.layers for group in self.attention if group.kind not in ("cross", "shared", "linear"))

    @property
    def plain(self) -> bool:
        """Whether every layer is one of `heads`, `kv_heads` and `head_dim`."""
        return self.mla is None and all(group.plain for group in self.attention)


class ModelFacts(_Frozen):
    """What is known of one model; blanks stay None.

    linear_params / other_params: parameters that quantisation shrinks / that stay 16-bit (embeddings,
    lm_head, norms, routers, vision). expert_params: of them, those of all routed experts. active_params: those
    that work on one token, without the experts it does not reach and without the embedding, of which it reads a row.
    prediction_params: of layers that predict further tokens,
    which published files hold and engines load for speculative decoding only; in none of the other numbers but
    file_bytes; None: of a layout that is not established. file_bytes: exact size of the published weights at
    native_precision; native_bytes: the same, computed from what the configuration says of each layer; bytes_by_dtype:
    by tensor dtype. quantization: vLLM's name of how they were quantised. from_files: read from files on disk, so
    native_precision is what can be served; gguf: from a GGUF file, so for llama.cpp. max_positions: the longest
    context the model was made for (max_position_embeddings), None where unknown; max_positions_source: where that was
    read; rope_scaling: the scaling of rotary positions that its configuration states and max_positions counts on,
    None: none is stated.
    """

    id: str
    architecture: str
    native_precision: str | None = None
    shape: Shape | None = None
    total_params: int | None = None
    linear_params: int | None = None
    other_params: int | None = None
    expert_params: int | None = None
    active_params: int | None = None
    prediction_params: int | None = 0
    file_bytes: int | None = None
    native_bytes: int | None = None
    quantization: str | None = None
    bytes_by_dtype: tuple[tuple[str, int], ...] = ()
    from_files: bool = False
    gguf: bool = False
    max_positions: int | None = None
    max_positions_source: str | None = None
    rope_scaling: str | None = None
    source: str
    confidence: Confidence
    notes: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()

    def __hash__(self) -> int:
        return hash((self.id, self.source, self.file_bytes))

    @property
    def sizable(self) -> bool:
        """Whether weights and KV cache can be computed; if not, `missing` says what is not known."""
        return self.shape is not None and not self.missing

    @property
    def status(self) -> str:
        """`sized`, or `known, not sized: …` with what is missing."""
        return "sized" if self.sizable else "known, not sized: " + ", ".join(self.missing)
