"""What fine-tuning takes of each device: weights, gradients, optimizer, activations and logits, in bytes.

Counted for decoders whose layout is established here, as Hugging Face's code lays them out, trained by a plain loop:
AdamW with moments in fp32; what is trained is kept in fp32 and computed in `precision` (torch.autocast), what is frozen
is kept in `precision` or quantized; the head sees only the positions that are trained. It is an upper estimate: the
attention that repeats keys and values, and every row as long as `context`.

Sources: Rajbhandari et al. 2020, ZeRO, arXiv:1910.02054, §3 (what AdamW keeps for each parameter, and who shards what);
Dettmers et al. 2023, QLoRA, arXiv:2305.14314, §3 (nf4's constants); Hu et al. 2021, LoRA, arXiv:2106.09685, §4.2;
Korthikanti et al. 2022, arXiv:2205.05198, §4 (how activations are counted: each tensor that backward needs).
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from aim_profile.errors import SizingError
from aim_profile.models.facts import ModelFacts, Shape
from aim_profile.units import GIB

from .fit import CONTEXT_CEILING_TOKENS
from .kv_cache import not_sized

Method = Literal["lora", "qlora", "full"]
Sharding = Literal["ddp", "fsdp2", "deepspeed"]

FP32 = 4
#: Outside torch on a GPU: KAITO's planning constant (kaito-project/kaito, model_catalog.yaml), as in fit.py.
GPU_RUNTIME_BYTES = int(0.6 * GIB)
#: On a CPU: interpreter, torch, transformers and PEFT, resident before a model is loaded: measured, `docs/trainer.md`.
CPU_RUNTIME_BYTES = int(0.56 * GIB)
#: Bytes of a weight in nf4 with double quantization: 4 bits, 8 for each 64 of them, 32 for each 64 × 256.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
#: LLM.int8: a byte for each weight; a scale in fp32 for each row of them is less than a thousandth of it.
INT8_BYTES = 1 + FP32 / 1024

#: Architectures whose linear layers, norms and activations are those counted below.
_PLAIN = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "mixtral"})
_FUSED = frozenset({"phi3"})
KNOWN = _PLAIN | _FUSED
_FOUR_NORMS = frozenset({"gemma2", "gemma3_text"})
_QK_NORM = frozenset({"qwen3", "gemma3_text"})


class Training(BaseModel):
    """What is trained. batch: rows of one pass on a device; context: tokens of a row; workers: devices, one process on
    each; accumulation: passes in an optimizer step; trained_share: of the tokens, those whose loss counts; classes: the
    outputs of a classification's head, None: the vocabulary.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: str = Field(min_length=1)
    method: Method = "lora"
    quantization: Literal["nf4", "int8"] | None = None
    batch: int = Field(default=1, ge=1, le=65_536)
    context: int = Field(default=2048, ge=8, le=CONTEXT_CEILING_TOKENS)
    precision: Literal["bf16", "fp32"] = "bf16"
    gradient_checkpointing: bool = True
    accumulation: int = Field(default=1, ge=1)
    lora_rank: int = Field(default=16, ge=1, le=512)
    lora_targets: tuple[str, ...] = ("all-linear",)
    lora_dropout: float = Field(default=0.05, ge=0, lt=1)
    workers: int = Field(default=1, ge=1, le=4096)
    strategy: Sharding = "ddp"
    zero_stage: Literal[1, 2, 3] = 2
    trained_share: float = Field(default=1.0, gt=0, le=1)
    classes: int | None = Field(default=None, ge=2)

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.quantization and self.method != "qlora":
            raise ValueError(f"quantization is of method qlora (method is {self.method})")
        sharded = self.strategy == "fsdp2" or (self.strategy, self.zero_stage) == ("deepspeed", 3)
        if self.method == "qlora" and sharded:
            raise ValueError("quantized weights are not sharded: use ddp, or method lora")
        return self

    @property
    def compute_bytes(self) -> int:
        """Of an activation."""
        return 2 if self.precision == "bf16" else FP32

    def shards(self, what: Literal["optimizer", "gradients", "weights"]) -> int:
        """Devices over which it is spread: ZeRO's stages 1, 2 and 3; FSDP2 is the third."""
        if self.strategy == "ddp":
            return 1
        stage = 3 if self.strategy == "fsdp2" else self.zero_stage
        return self.workers if stage >= {"optimizer": 1, "gradients": 2, "weights": 3}[what] else 1


class Memory(NamedTuple):
    """Bytes on each device. weights: as they are kept; copies: of weights in the precision that is computed in, and
    layers that FSDP gathers; adapter: LoRA's own; activations: kept for the backward pass; logits: the head's, with
    their gradient; runtime: beside torch's tensors.
    """

    weights: int
    copies: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    runtime: int
    accumulates: bool

    @property
    def total(self) -> int:
        """The peak. In a single pass activations leave as gradients come: the larger of both counts."""
        passing = self.activations + self.logits
        both = self.gradients + passing if self.accumulates else max(self.gradients, passing)
        return self.weights + self.copies + self.adapter + self.optimizer + both + self.runtime


def memory(model: ModelFacts, training: Training, *, on_cpu: bool = False) -> Memory:
    """Raises SizingError for a model whose layout is not established here, or target modules it does not have."""
    shape = _shape(model)
    trained = _trained(model, shape, training)
    frozen = 0 if training.method == "full" else _frozen_bytes(model, training)
    own = trained * FP32
    return Memory(
        weights=_part(frozen + (own if training.method == "full" else 0), training.shards("weights")),
        copies=_copies(model, shape, training),
        adapter=0 if training.method == "full" else own,
        gradients=_part(own, training.shards("gradients")),
        optimizer=_part(2 * own, training.shards("optimizer")),
        activations=_activations(model, shape, training),
        logits=_logits(shape, training),
        runtime=CPU_RUNTIME_BYTES if on_cpu else GPU_RUNTIME_BYTES,
        accumulates=training.accumulation > 1,
    )


def largest_batch(model: ModelFacts, training: Training, budget_bytes: int, *, on_cpu: bool = False) -> int:
    """The most rows of one pass that fit the budget; 0 where not even one does."""
    low, high = 0, 65_536
    while low < high:
        middle = (low + high + 1) // 2
        need = memory(model, training.model_copy(update={"batch": middle}), on_cpu=on_cpu).total
        low, high = (middle, high) if need <= budget_bytes else (low, middle - 1)
    return low


def adapter_parameters(model: ModelFacts, rank: int, targets: tuple[str, ...] = ("all-linear",)) -> int:
    """Of LoRA's two matrices beside each target of each layer: rank × (inputs + outputs). Raises SizingError."""
    shape = _shape(model)
    return shape.layers * rank * sum(sum(widths) for widths in _targets(model, shape, targets).values())


def _shape(model: ModelFacts) -> Shape:
    if model.shape is None or model.linear_params is None or model.other_params is None:
        raise not_sized(model)
    if model.architecture not in KNOWN or model.shape.mla is not None:
        raise SizingError(
            f"{model.id}: what training a {model.architecture} takes is not established here",
            field="model",
            value=model.id,
            remedy=f"known are {', '.join(sorted(KNOWN))}; give memory instead",
        )
    return model.shape


def _linears(model: ModelFacts, shape: Shape) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of each linear layer of one decoder layer. Experts are no linear layers but one weight."""
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = {"o_proj": (query, shape.hidden)}
    if model.architecture in _FUSED:
        attention |= {"qkv_proj": (shape.hidden, query + 2 * key)}
        feed = {"gate_up_proj": (shape.hidden, 2 * shape.ffn), "down_proj": (shape.ffn, shape.hidden)}
    else:
        attention |= {"q_proj": (shape.hidden, query)} | dict.fromkeys(("k_proj", "v_proj"), (shape.hidden, key))
        feed = dict.fromkeys(("gate_proj", "up_proj"), (shape.hidden, shape.ffn))
        feed |= {"down_proj": (shape.ffn, shape.hidden)}
    return attention | ({} if shape.experts else feed)


def _targets(model: ModelFacts, shape: Shape, asked: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    linears = _linears(model, shape)
    if asked == ("all-linear",):
        return linears
    for name in asked:
        if name not in linears:
            raise SizingError(
                f"{model.id}: {name!r} is no linear layer of a {model.architecture}",
                field="lora_targets",
                value=name,
                remedy=f"there are {', '.join(sorted(linears))}",
            )
    return {name: linears[name] for name in asked}


def _trained(model: ModelFacts, shape: Shape, training: Training) -> int:
    head = shape.hidden * training.classes if training.classes else 0
    if training.method == "full":
        # A classification has its own head instead of the vocabulary's, which tied models share with the embedding.
        lost = shape.hidden * shape.vocab if training.classes and not shape.tied else 0
        return _parameters(model) - lost + head
    return adapter_parameters(model, training.lora_rank, training.lora_targets) + head


def _parameters(model: ModelFacts) -> int:
    return (model.linear_params or 0) + (model.other_params or 0)


def _frozen_bytes(model: ModelFacts, training: Training) -> int:
    """Quantization takes the linear layers; embeddings, head and norms stay in the precision that is computed in."""
    if training.method != "qlora":
        return _parameters(model) * training.compute_bytes
    each = INT8_BYTES if training.quantization == "int8" else NF4_BYTES
    return int((model.linear_params or 0) * each) + (model.other_params or 0) * training.compute_bytes


def _copies(model: ModelFacts, shape: Shape, training: Training) -> int:
    """autocast keeps a copy of each trained weight until its context ends; FSDP gathers what no layer holds (the
    embedding and the head) and two layers, the one at work and the next.
    """
    e = training.compute_bytes
    if training.shards("weights") > 1:
        layers = (model.linear_params or 0) // shape.layers
        return ((model.other_params or 0) + 2 * layers) * e
    return (model.linear_params or 0) * e if training.method == "full" and e != FP32 else 0


def _activations(model: ModelFacts, shape: Shape, training: Training) -> int:
    """All layers' tensors; with checkpointing each layer's input, and the tensors of the one that is done again."""
    tokens = training.batch * training.context
    layer = tokens * _kept_by_a_layer(model, shape, training)
    if not training.gradient_checkpointing:
        return shape.layers * layer
    return shape.layers * tokens * shape.hidden * training.compute_bytes + layer


def _kept_by_a_layer(model: ModelFacts, shape: Shape, training: Training) -> int:
    """Bytes a token, of what one layer keeps for its backward pass.

    Norms keep their input in fp32 (Hugging Face's RMSNorm). Attention keeps query, repeated keys and values, its output
    and that as the projection's input; the feed-forward part gate, up, activation and product. Linear layers keep their
    input where something beside or in it is trained: one for those that share it; with an adapter of their own dropout,
    or of another dtype, each has its own.
    """
    e = training.compute_bytes
    hidden, query, key = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    feed = shape.ffn if shape.experts is None else (shape.experts.per_token + shape.experts.shared) * shape.experts.ffn
    norms = (4 if model.architecture in _FOUR_NORMS else 2) * hidden
    norms += query + key if model.architecture in _QK_NORM else 0
    kept = norms * FP32 + 5 * query * e + 4 * feed * e + 2 * hidden * e
    if training.method == "full":
        return kept + norms * e
    inputs = sum(width for width, _ in _targets(model, shape, training.lora_targets).values())
    if training.lora_dropout:
        return kept + 2 * inputs * e
    return kept + (inputs * e if e != FP32 else 0)


def _logits(shape: Shape, training: Training) -> int:
    """As computed, in fp32, their logarithm of softmax, and the gradients of both: cross-entropy in fp32."""
    if training.classes:
        return training.batch * training.classes * 5 * FP32
    positions = int(training.batch * training.context * training.trained_share)
    return positions * shape.vocab * (4 * FP32 + (training.compute_bytes if training.precision == "bf16" else 0))


def _part(whole: int, shards: int) -> int:
    return -(-whole // shards)
