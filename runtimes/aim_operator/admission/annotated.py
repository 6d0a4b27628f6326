"""Annotations, checked by the settings that the pods read them with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from aim_guardrail.policy import PolicyError, shipped_names
from aim_guardrail.settings import GuardrailSettings
from aim_kserve.settings import ANNOTATION_PREFIX, ServerSettings, SettingsError
from aim_runtime.settings import RuntimeSettings

from .denied import Denied
from .service import Service

POLICY, RULES = f"{ANNOTATION_PREFIX}guardrail-policy", f"{ANNOTATION_PREFIX}guardrails"

S = TypeVar("S", bound=ServerSettings)


def check(service: Service, policies: Mapping[str, Mapping[str, Any]]) -> None:
    """policies: specs of the GuardrailPolicies in the service's namespace, by name. Raises Denied."""
    _read(RuntimeSettings, service.seen_by("predictor"), "the runtime")
    told = service.seen_by("transformer" if "transformer" in service.body["spec"] else "predictor")
    guardrail = _read(GuardrailSettings, told, "the guardrail")
    named = told.get(POLICY)
    if named is not None and not named.startswith("/") and named not in {*policies, *shipped_names()}:
        known = ", ".join([*sorted(policies), *shipped_names()])
        raise Denied(
            f"metadata.annotations[{POLICY}]",
            named,
            "no GuardrailPolicy of this namespace and no shipped policy is called so",
            f"name one of {known}; or the path of a file that the guardrail's pod mounts",
        )
    spec = policies.get(named or "", {})
    if spec.get("tenant") or spec.get("shadow"):
        problem = "the policy is one tenant's, or a shadow, and none would be everybody's"
        raise Denied(f"metadata.annotations[{POLICY}]", named, problem, "name one without tenant and shadow")
    if named is None or named in shipped_names():
        _check_rules(guardrail, told)


def _check_rules(guardrail: GuardrailSettings, told: Mapping[str, str]) -> None:
    try:
        # Which countries' database the guardrail has, its flags say, which are not looked at here.
        guardrail.model_copy(update={"geo_database": Path("/")}).read_policies()
    except PolicyError as error:
        problem = str(error).removeprefix(RULES).lstrip(",: ")
        remedy = "`aim-guardrail policy schema` says what a rule may hold"
        raise Denied(f"metadata.annotations[{RULES}]", told.get(RULES), problem, remedy) from None


def _read(settings: type[S], annotations: Mapping[str, str], whose: str) -> S:
    try:
        return settings.of_annotations(annotations)
    except SettingsError as error:
        raise _denied(str(error), annotations, whose) from None


def _denied(message: str, annotations: Mapping[str, str], whose: str) -> Denied:
    """Of the settings' own line, `annotation KEY: PROBLEM (got VALUE)`; of rules over several, `settings: PROBLEM`."""
    key, _, problem = message.splitlines()[0].removeprefix("annotation ").partition(": ")
    problem = problem.rpartition(" (got ")[0] or problem
    if not key.startswith(ANNOTATION_PREFIX):
        return Denied("metadata.annotations", None, problem, f"{whose} does not start with that")
    remedy = (
        "correct the name, or leave it out" if problem.startswith("unknown") else f"{whose} does not start with that"
    )
    return Denied(f"metadata.annotations[{key}]", annotations.get(key), problem, remedy)
