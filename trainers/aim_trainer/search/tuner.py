"""Ray Tune drives the trials: who is tried next, who is stopped, how many at once."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch
from ray.tune.stopper import Stopper

from aim_trainer.job.judged import Search

from .asked import search_of
from .cost import Curve, gain_per_hour
from .results import End, Trial
from .space import space
from .trial import Given, run_trial

#: ASHA: of what was measured at 10, 30 and 90 % of the steps, the better third goes on.
_GRACE_PERCENT, _REDUCTION = 10, 3


def tried(given: Given) -> list[Trial]:
    """Runs all trials. One that fails is told of in the result, and the others go on."""
    asked = search_of(given.job)
    resources = given.job.spec.resources
    wanted = {"cpu": resources.cpu, "gpu": resources.gpu}
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # we write our own, and Tune misses its
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
    trainable = tune.with_resources(tune.with_parameters(_trainable, given=given), wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Tune about itself
        results = _tuner(given, asked, trainable).fit()
    return [_told(result, asked, given.root) for result in results]


def _tuner(given: Given, asked: Search, trainable: Any) -> tune.Tuner:
    """A new one, or what a killed search left of it: Tune keeps trials, sampler and scheduler every few seconds."""
    kept = given.root / "ray" / "tune"
    if any(kept.glob("experiment_state-*.json")) and tune.Tuner.can_restore(str(kept)):
        return tune.Tuner.restore(str(kept), trainable)
    return tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=_WithinBudget(given, asked),
            scheduler=_scheduler(asked),
            num_samples=asked.num_trials,
            max_concurrent_trials=asked.parallel_trials,
            reuse_actors=True,  # the next trial need not import everything anew
            trial_name_creator=lambda trial: str(trial.trial_id),
            trial_dirname_creator=lambda trial: str(trial.trial_id),
        ),
        run_config=tune.RunConfig(
            name=kept.name,
            storage_path=str(kept.parent.absolute()),
            stop=_TooCostly(asked),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=0),
        ),
    )


def _trainable(config: dict[str, Any], given: Given) -> None:
    """In a process of Ray's."""
    run_trial(given, tune.get_context().get_trial_id(), config, tune.report)


def _scheduler(asked: Search) -> ASHAScheduler | None:
    if asked.scheduler == "none":
        return None
    mode = _mode(asked)
    return ASHAScheduler(
        time_attr="percent",
        metric=asked.objective.metric,
        mode=mode,
        max_t=101,
        grace_period=_GRACE_PERCENT,
        reduction_factor=_REDUCTION,
    )


def _mode(asked: Search) -> str:
    return "min" if asked.objective.direction == "minimize" else "max"


class _WithinBudget(OptunaSearch):  # type: ignore[misc]  # untyped where we check
    """Optuna's values (or random ones by its sampler), and none any more once the GPU-hours are spent."""

    def __init__(self, given: Given, asked: Search) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        kind = optuna.samplers.RandomSampler if asked.algorithm == "random" else optuna.samplers.TPESampler
        super().__init__(
            OptunaSearch.convert_search_space(space(given.job)),
            metric=asked.objective.metric,
            mode=_mode(asked),
            sampler=kind(seed=asked.seed),
        )
        self._budget, self._spent = asked.budget_gpu_hours, dict[str, float]()

    def suggest(self, trial_id: str) -> Any:
        if self._budget is not None and sum(self._spent.values()) >= self._budget:
            return Searcher.FINISHED
        return super().suggest(trial_id)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self._spent[trial_id] = float(result["gpu_hours"])
        super().on_trial_result(trial_id, result)


class _TooCostly(Stopper):  # type: ignore[misc]  # untyped where we check
    """Ends trials whose expected gain is not worth their GPU-hours: see `cost`."""

    def __init__(self, asked: Search) -> None:
        self._asked, self._curves = asked, dict[str, Curve]()

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        curve = self._curves.setdefault(trial_id, Curve())
        percent = float(result["percent"])
        curve.add(percent / 100, float(result[self._asked.objective.metric]), float(result["gpu_hours"]))
        least = self._asked.min_gain_per_gpu_hour
        if least is None or curve.is_over:
            return False
        others = {name: other for name, other in self._curves.items() if name != trial_id}
        gain = gain_per_hour(curve, others, minimize=self._asked.objective.direction == "minimize")
        return gain is not None and gain < least

    def stop_all(self) -> bool:
        return False


def _told(result: Any, asked: Search, root: Path) -> Trial:
    metrics = result.metrics or {}
    name = str(metrics.get("trial_id") or Path(result.path).name)
    end: End = "failed" if result.error else "finished" if metrics.get("percent") == 100 else "stopped"
    value = metrics.get(asked.objective.metric)
    return Trial(
        name=name,
        values=dict(result.config or {}),
        end=end,
        value=None if value is None else float(value),
        step=int(metrics.get("step", 0)),
        gpu_hours=float(metrics.get("gpu_hours", 0.0)),
        why=_why(result.error) if result.error else "",
    )


def _why(problem: Exception) -> str:
    """What the trial itself raised, its first line; else the last of what Ray tells of it."""
    cause = getattr(problem, "cause", None)
    lines = [line.strip() for line in str(cause or problem).splitlines() if line.strip()]
    return lines[0 if cause else -1][:300] if lines else type(problem).__name__
