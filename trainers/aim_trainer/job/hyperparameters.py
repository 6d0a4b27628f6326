"""How it is trained."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from aim_profile.files.place import MisplacedError

from .fields import Flag, Number, Part, Text, Whole

#: Ranks vLLM serves adapters of (`--max-lora-rank`): MaxLoRARanks of vLLM's config/lora.py.
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
#: Understood, and refused for what vLLM's PEFTHelper would do with the adapter.
_NOT_SERVED: dict[str, tuple[object, str]] = {
    "doRA": (False, "vLLM loads no adapter made with DoRA; leave it out, or tune with method full"),
    "modulesToSave": (
        [],
        "vLLM loads no adapter with modules_to_save (whole layers beside the LoRA weights); "
        "leave it out, or tune with method full",
    ),
    "bias": ("none", "vLLM loads no adapter that trains biases; write none, or tune with method full"),
}
_OF_LORA = frozenset(
    {"lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules", "rslora", "bias", "do_ra", "modules_to_save"}
)


class Hyperparameters(Part):
    """batchSize: rows a step on one worker; globalBatchSize: rows an optimizer step over all workers, which keeps the
    mathematics when their number changes; None: batchSize × workers.
    """

    learning_rate: Number = Field(default=2e-4, gt=0, le=1)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Number = Field(default=0.03, ge=0, le=1_000_000, description="below 1 a share of all steps, else steps")
    epochs: Number = Field(default=1, gt=0, le=1000)
    max_steps: Whole | None = Field(default=None, ge=1, description="ends there, whatever epochs says")
    batch_size: Annotated[Whole, Field(ge=1, le=65_536)] | Literal["auto"] = Field(
        default="auto", description="rows a step on one worker; auto: the most that fit"
    )
    global_batch_size: Whole | None = Field(
        default=None, ge=1, description="rows an optimizer step over all workers; left out: batchSize × workers"
    )
    max_seq_length: Whole = Field(default=2048, ge=8, le=1_048_576)
    precision: Literal["auto", "bf16", "fp32"] = Field(default="auto", description="auto: bf16 on a GPU, fp32 on a CPU")
    gradient_checkpointing: Flag = True
    weight_decay: Number = Field(default=0.0, ge=0, le=1)
    max_grad_norm: Number = Field(default=1.0, gt=0, le=1e6)
    adam_beta1: Number = Field(default=0.9, ge=0, lt=1)
    adam_beta2: Number = Field(default=0.999, ge=0, lt=1)
    adam_epsilon: Number = Field(default=1e-8, gt=0, lt=1)
    seed: Whole = Field(default=42, ge=0)
    lora_rank: Whole = Field(
        default=16, ge=1, le=512, description="the serving profile gives vLLM the next rank that it serves"
    )
    lora_alpha: Number = Field(default=32, gt=0, le=1e6)
    lora_dropout: Number = Field(default=0.05, ge=0, lt=1)
    lora_target_modules: list[Text] = Field(
        default=["all-linear"], min_length=1, max_length=64, description="names of linear layers, or all-linear alone"
    )
    rslora: Flag = Field(default=False, description="scale by alpha / sqrt(rank)")
    do_ra: Literal[False] = Field(default=False, alias="doRA", description="refused: vLLM does not load it")
    modules_to_save: list[Text] = Field(default=[], max_length=0, description="refused: vLLM does not load them")
    bias: Literal["none"] = Field(default="none", description="anything else is refused: vLLM does not load it")
    neftune_alpha: Number | None = Field(default=None, gt=0, le=1e6, description="noise on embeddings while training")

    @model_validator(mode="before")
    @classmethod
    def _can_be_served(cls, raw: Any) -> Any:
        if isinstance(raw, dict):
            for key, (harmless, why) in _NOT_SERVED.items():
                if key in raw and raw[key] != harmless:
                    raise MisplacedError((key,), why)
        return raw

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise MisplacedError(
                ("warmup",), f"from 1 on it counts steps, which are whole; below 1 it is a share (got {self.warmup:g})"
            )
        if self.max_steps is not None and 1 <= self.warmup >= self.max_steps:
            raise MisplacedError(("warmup",), f"{self.warmup:g} steps of {self.max_steps} (maxSteps): none is left")
        if "all-linear" in self.lora_target_modules and len(self.lora_target_modules) > 1:
            raise MisplacedError(("loraTargetModules",), "all-linear names every linear layer: nothing beside it")
        return self

    @property
    def target_modules(self) -> list[str] | str:
        """As PEFT's LoraConfig takes them: names, or the word all-linear."""
        return "all-linear" if self.lora_target_modules == ["all-linear"] else self.lora_target_modules

    @property
    def served_rank(self) -> int:
        """The least `--max-lora-rank` under which vLLM serves this adapter."""
        return next(rank for rank in LORA_RANKS if rank >= self.lora_rank)

    def set_for_lora(self) -> list[str]:
        """The keys given that mean something to an adapter only, as they stand in the file."""
        given = sorted(self.model_fields_set & _OF_LORA)
        return [type(self).model_fields[name].alias or name for name in given]
