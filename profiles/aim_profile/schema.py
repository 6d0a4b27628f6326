"""JSON Schemas of the files people write, taken from the models that read them, so they cannot disagree."""

from __future__ import annotations

from typing import Any

from .fleet import FleetFile
from .plan import Plan
from .profile import Profile
from .profile_files import Unified
from .workload import Workloads

_DRAFT = "https://json-schema.org/draft/2020-12/schema"


def kinds() -> tuple[str, ...]:
    """What has a schema."""
    return tuple(_models())


def schema_of(kind: str) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of that kind of file; unknown keys are refused in it too."""
    title = f"aim-profile {kind}"
    return {"$schema": _DRAFT, **_models()[kind].model_json_schema(), "title": title}


def _models() -> dict[str, Any]:
    return {"profile": Profile, "unified": Unified, "fleet": FleetFile, "workloads": Workloads, "plan": Plan}
