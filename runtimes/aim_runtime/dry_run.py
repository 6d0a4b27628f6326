"""``--dry_run``: what would be started, on any machine. Starts nothing and imports neither KServe nor an engine."""

from __future__ import annotations

import json
from typing import Any

from aim_kserve.errors import StartupError
from aim_profile.errors import AimProfileError
from aim_runtime.assignment import Assignment, Refused
from aim_runtime.models.assigned import assigned
from aim_runtime.models.file import load_models
from aim_runtime.qos.policy import QosPolicy
from aim_runtime.qos.request import CLASSES
from aim_runtime.settings import RuntimeSettings
from aim_runtime.start import described, located, prepare, refuse


def dry_run(settings: RuntimeSettings) -> int:
    """Print the assignment, of several models (``--models``) all of them; exit code 0, or 1 with why there is none."""
    try:
        found, levels = _assignments(settings), _service_levels(settings)
    except StartupError as error:
        if settings.output == "json":
            _print(json.dumps({"refused": _reason(error)}, indent=2))
        return refuse(settings, error)
    if settings.output == "text":
        _print("\n\n".join([*map(as_text, found), *_titled_levels(levels)]))
    elif settings.models is None:
        _print(json.dumps(found[0].model_dump(mode="json") | levels, indent=2))
    else:
        _print(json.dumps([each.model_dump(mode="json") | levels for each in found], indent=2))
    return 0


def _assignments(settings: RuntimeSettings) -> list[Assignment]:
    if settings.models is None:
        return [prepare(located(settings))]
    try:
        listed, own = load_models(settings.models, settings)
    except AimProfileError as error:
        raise Refused.because(error) from None
    return assigned(listed, own, settings.placement)


def _service_levels(settings: RuntimeSettings) -> dict[str, Any]:
    """``{"qos_policy": {…}}`` as it holds, where requests take turns."""
    if not settings.takes_turns:
        return {}
    try:
        policy = QosPolicy.default() if settings.qos_policy is None else QosPolicy.read(settings.qos_policy)
    except AimProfileError as error:
        raise Refused.because(error) from None
    told = policy.model_copy(update={"classes": {name: policy.of(name) for name in CLASSES}})
    return {"qos_policy": told.model_dump(mode="json", by_alias=True)}


def _titled_levels(levels: dict[str, Any]) -> list[str]:
    return [f"service levels:\n{json.dumps(policy, indent=2)}" for policy in levels.values()]


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
