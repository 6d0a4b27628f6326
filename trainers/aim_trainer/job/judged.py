"""What the tuned model must show, and what is tried to find the best one."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from .fields import Part, Text, Uri, Whole

Metric = Literal[
    "eval_loss", "perplexity", "exact_match", "rouge_l", "regressions", "guardrail_blocked", "accuracy", "f1"
]


class Gate(Part):
    """A bound: of the metric itself (min, max), or of its change against the base model (minDelta, maxDelta)."""

    metric: Metric
    min: float | None = None
    max: float | None = None
    min_delta: float | None = None
    max_delta: float | None = None

    @model_validator(mode="after")
    def _has_a_bound(self) -> Self:
        if (self.min, self.max, self.min_delta, self.max_delta) == (None, None, None, None):
            raise ValueError("a gate needs min, max, minDelta or maxDelta")
        return self


class GuardrailCheck(Part):
    """Sampled answers go through a running guardrail (`POST /filter`); the share it blocks is guardrail_blocked."""

    url: Uri
    policy: Text | None = None
    samples: Whole = Field(default=50, ge=1, le=10_000)


class Validation(Part):
    """every_steps: between two measures of eval_loss while training; None: once an epoch."""

    every_steps: Whole | None = Field(default=None, ge=1)
    metrics: list[Metric] = Field(default=["eval_loss", "perplexity"])
    samples: Whole = Field(default=50, ge=1, le=10_000, description="held-out rows that answers are generated for")
    max_new_tokens: Whole = Field(default=128, ge=1, le=8192)
    regression_prompts: Uri | None = Field(default=None, description="JSONL of {prompt, expected | contains | matches}")
    guardrail: GuardrailCheck | None = None
    gates: list[Gate] = Field(default=[])


class Span(Part):
    min: float
    max: float

    @model_validator(mode="after")
    def _is_a_span(self) -> Self:
        if not self.min < self.max:
            raise ValueError(f"min must be below max (got {self.min:g} and {self.max:g})")
        return self


class SearchSpace(Part):
    """One of the three, as Kubeflow's OptimizationJob names them."""

    uniform: Span | None = None
    log_uniform: Span | None = None
    categorical: list[float | int | str | bool] | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if sum(kind is not None for kind in (self.uniform, self.log_uniform, self.categorical)) != 1:
            raise ValueError("give one of uniform, logUniform and categorical")
        return self


class Parameter(Part):
    """name: a numeric field of the job, as in hyperparameters.learningRate."""

    name: Text
    search_space: SearchSpace


class Objective(Part):
    metric: Literal["eval_loss", "perplexity", "accuracy", "f1"] = "eval_loss"
    direction: Literal["minimize", "maximize"] = "minimize"


class Search(Part):
    """budgetGpuHours: none is started beyond it; minGainPerGpuHour: a trial whose expected gain is less is stopped."""

    objective: Objective = Objective()
    algorithm: Literal["optuna", "random"] = "optuna"
    scheduler: Literal["asha", "none"] = "asha"
    num_trials: Whole = Field(default=8, ge=1, le=1000)
    parallel_trials: Whole = Field(default=1, ge=1, le=256)
    budget_gpu_hours: float | None = Field(default=None, gt=0)
    min_gain_per_gpu_hour: float | None = Field(default=None, ge=0)
    seed: Whole = 0
    parameters: Annotated[list[Parameter], Field(min_length=1)]
