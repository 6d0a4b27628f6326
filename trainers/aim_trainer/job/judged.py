"""What the tuned model must show, and what is tried to find the best one."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from aim_profile.files.place import MisplacedError

from .fields import DataUri, Number, Part, Text, WebUri, Whole

Metric = Literal[
    "eval_loss", "perplexity", "exact_match", "rouge_l", "regressions", "guardrail_blocked", "accuracy", "f1"
]
#: What can be measured while training goes on.
Watched = Literal["eval_loss", "perplexity", "accuracy", "f1"]
LOWER_IS_BETTER = ("eval_loss", "perplexity", "guardrail_blocked")


#: Shares, from 0 to 1.
SHARES = ("exact_match", "rouge_l", "regressions", "guardrail_blocked", "accuracy", "f1")


class Gate(Part):
    """A bound: of the metric itself (min, max), or of its change against the base model (minDelta, maxDelta)."""

    metric: Metric
    min: Number | None = None
    max: Number | None = None
    min_delta: Number | None = None
    max_delta: Number | None = None

    @model_validator(mode="after")
    def _has_a_bound(self) -> Self:
        if (self.min, self.max, self.min_delta, self.max_delta) == (None, None, None, None):
            raise ValueError("a gate needs min, max, minDelta or maxDelta")
        for least, most, key in ((self.min, self.max, "min"), (self.min_delta, self.max_delta, "minDelta")):
            if least is not None and most is not None and least > most:
                raise MisplacedError((key,), f"{least:g} is above the most allowed, {most:g}: no value passes")
        self._refuse_impossible()
        return self

    def _refuse_impossible(self) -> None:
        """A share is not a percentage: `min: 80` would fail every model, after all of its training."""
        most = 1.0 if self.metric in SHARES else math.inf
        for key, least in (("min", self.min), ("minDelta", self.min_delta)):
            if least is not None and least > most:
                raise MisplacedError((key,), f"{self.metric} is a share, 1 at most (got {least:g}): no value passes")
        if self.max is not None and self.max < 0:
            raise MisplacedError(("max",), f"{self.metric} is 0 at least (got {self.max:g}): no value passes")


class GuardrailCheck(Part):
    """Sampled answers go through a running guardrail (`POST /filter`); the share it blocks is guardrail_blocked."""

    url: WebUri
    policy: Text | None = None
    samples: Whole = Field(default=50, ge=1, le=10_000)


class Validation(Part):
    """every_steps: between two measures of eval_loss while training; None: once an epoch."""

    every_steps: Whole | None = Field(default=None, ge=1)
    metrics: list[Metric] = Field(
        default=["eval_loss", "perplexity"],
        min_length=1,
        max_length=8,
        description="of a classification eval_loss, accuracy, f1",
    )
    samples: Whole = Field(default=50, ge=1, le=10_000, description="held-out rows that answers are generated for")
    max_new_tokens: Whole = Field(default=128, ge=1, le=8192)
    regression_prompts: DataUri | None = Field(
        default=None, description="JSONL of {prompt, expected | contains | matches}"
    )
    guardrail: GuardrailCheck | None = None
    gates: list[Gate] = Field(default=[], max_length=64)


class Span(Part):
    min: Number
    max: Number

    @model_validator(mode="after")
    def _is_a_span(self) -> Self:
        if not self.min < self.max:
            raise ValueError(f"min must be below max (got {self.min:g} and {self.max:g})")
        return self


class SearchSpace(Part):
    """One of the three, as Kubeflow's OptimizationJob names them."""

    uniform: Span | None = None
    log_uniform: Span | None = None
    categorical: list[int | float | str | bool] | None = Field(default=None, min_length=1, max_length=64)

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if sum(kind is not None for kind in (self.uniform, self.log_uniform, self.categorical)) != 1:
            raise ValueError("give one of uniform, logUniform and categorical")
        if self.log_uniform is not None and self.log_uniform.min <= 0:
            raise MisplacedError(("logUniform", "min"), f"no logarithm of {self.log_uniform.min:g}: give more than 0")
        return self

    def ends(self) -> list[int | float | str | bool]:
        """The least and the most, or every choice: what must be allowed for the rest to be."""
        if self.categorical is not None:
            return self.categorical
        span = self.uniform or self.log_uniform
        return [span.min, span.max] if span else []


class Parameter(Part):
    """name: a numeric field of the job, as in hyperparameters.learningRate."""

    name: Text
    search_space: SearchSpace


class Objective(Part):
    metric: Watched = "eval_loss"
    direction: Literal["minimize", "maximize"] = "minimize"


class Search(Part):
    """budgetGpuHours: none is started beyond it; minGainPerGpuHour: a trial whose expected gain is less is stopped."""

    objective: Objective = Objective()
    algorithm: Literal["optuna", "random"] = "optuna"
    scheduler: Literal["asha", "none"] = "asha"
    num_trials: Whole = Field(default=8, ge=1, le=1000)
    parallel_trials: Whole = Field(default=1, ge=1, le=256)
    budget_gpu_hours: Number | None = Field(default=None, gt=0)
    min_gain_per_gpu_hour: Number | None = Field(default=None, ge=0)
    seed: Whole = Field(default=0, ge=0)
    parameters: list[Parameter] = Field(min_length=1, max_length=32)

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [parameter.name for parameter in self.parameters]
        for at, name in enumerate(names):
            if name in names[:at]:
                raise MisplacedError(
                    ("parameters", at, "name"), f"{name} is tried by parameters[{names.index(name)}] too"
                )
        if self.parallel_trials > self.num_trials:
            raise MisplacedError(
                ("parallelTrials",), f"{self.parallel_trials} at once of {self.num_trials} (numTrials)"
            )
        return self
