"""How it is trained."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from .fields import Part, Text, Whole

#: Ranks vLLM serves adapters of (`--max-lora-rank`): vLLM's LoRAConfig.
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


class Hyperparameters(Part):
    """batchSize: rows a step on one worker; globalBatchSize: rows an optimizer step over all workers, which keeps the
    mathematics when their number changes; None: batchSize × workers.
    """

    learning_rate: float = Field(default=2e-4, gt=0, le=1)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(default=0.03, ge=0, description="below 1 a share of all steps, else steps")
    epochs: float = Field(default=1, gt=0, le=1000)
    max_steps: Whole | None = Field(default=None, ge=1, description="ends there, whatever epochs says")
    batch_size: Whole | Literal["auto"] = Field(default="auto")
    global_batch_size: Whole | None = Field(default=None, ge=1)
    max_seq_length: Whole = Field(default=2048, ge=8, le=1_048_576)
    precision: Literal["auto", "bf16", "fp32"] = Field(default="auto", description="auto: bf16 on a GPU, fp32 on a CPU")
    gradient_checkpointing: bool = True
    weight_decay: float = Field(default=0.0, ge=0, le=1)
    max_grad_norm: float = Field(default=1.0, gt=0)
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    adam_epsilon: float = Field(default=1e-8, gt=0, lt=1)
    seed: Whole = Field(default=42, ge=0, lt=2**31)
    lora_rank: Whole = Field(default=16, ge=1, le=512)
    lora_alpha: float = Field(default=32, gt=0)
    lora_dropout: float = Field(default=0.05, ge=0, lt=1)
    lora_target_modules: list[Text] | Literal["all-linear"] = "all-linear"
    rslora: bool = False
    neftune_alpha: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _batches_divide(self) -> Self:
        if isinstance(self.batch_size, int) and not 1 <= self.batch_size <= 65_536:
            raise ValueError(f"batchSize: 1 to 65536, or auto (got {self.batch_size})")
        return self
