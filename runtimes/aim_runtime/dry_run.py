"""``--dry_run``: what would be started, on any machine. Starts nothing and imports neither KServe nor an engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from aim_kserve.errors import StartupError
from aim_profile.errors import AimProfileError
from aim_runtime.assignment import Assignment, Refused
from aim_runtime.models.assigned import assigned
from aim_runtime.models.file import load_models
from aim_runtime.qos.policy import policy_of
from aim_runtime.settings import RuntimeSettings
from aim_runtime.start import described, located, prepare, refuse


def dry_run(settings: RuntimeSettings) -> int:
    """Print the assignment, of several models (``--models``) all of them; exit code 0, or 1 with why there is none."""
    try:
        own = _assignments(settings)
        levels = _service_levels([settings, *(each for _, each in own)])
    except StartupError as error:
        if settings.output == "json":
            _print(json.dumps({"refused": _reason(error)}, indent=2))
        return refuse(settings, error)
    if settings.output == "text":
        _print("\n\n".join(f"{as_text(found)}{_titled_levels(levels(each))}" for found, each in own))
        return 0
    told = [found.model_dump(mode="json") | levels(each) for found, each in own]
    _print(json.dumps(told[0] if settings.models is None else told, indent=2))
    return 0


def _assignments(settings: RuntimeSettings) -> list[tuple[Assignment, RuntimeSettings]]:
    """Each with the settings of its model."""
    if settings.models is None:
        return [(prepare(located(settings)), settings)]
    try:
        listed, own = load_models(settings.models, settings)
    except AimProfileError as error:
        raise Refused.because(error) from None
    of_model = {model.name: each for model, each in zip(listed.served, own, strict=True)}
    return [(found, of_model[found.model]) for found in assigned(listed, own, settings.placement)]


def _service_levels(settings: Sequence[RuntimeSettings]) -> Callable[[RuntimeSettings], dict[str, Any]]:
    """A model's settings → ``{"qos_policy": {…}}`` as it holds for that model, where requests take turns."""
    if not any(each.takes_turns for each in settings):
        return lambda of: {}
    try:
        policy = policy_of(settings[0].qos_policy)
    except AimProfileError as error:
        raise Refused.because(error) from None

    def levels(of: RuntimeSettings) -> dict[str, Any]:
        told = policy.of_model(of.qos_priority, of.latency_slo_ms)
        return {"qos_policy": told.model_dump(mode="json", by_alias=True)}

    return levels


def _titled_levels(levels: dict[str, Any]) -> str:
    return "".join(f"\n\nservice levels:\n{json.dumps(policy, indent=2)}" for policy in levels.values())


def as_text(assignment: Assignment) -> str:
    """The same for people: what the log says, then flags and environment as they are set."""
    flags = [f"  --{name} {_word(value)}" for name, value in assignment.engine_args.items()]
    variables = [f"  {name}={value}" for name, value in assignment.env.items()]
    return "\n".join(
        [*described(assignment), *_titled("engine arguments:", flags), *_titled("environment:", variables)]
    )


def _titled(title: str, lines: list[str]) -> list[str]:
    return [title, *lines] if lines else []


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _reason(error: StartupError) -> dict[str, Any]:
    return error.as_json() if isinstance(error, Refused) else {"problem": str(error)}


def _print(text: str) -> None:
    print(text)  # noqa: T201  the answer that was asked for
