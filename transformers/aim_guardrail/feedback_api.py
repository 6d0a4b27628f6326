"""``POST /feedback``: somebody says that a verdict was wrong.

    {"request_id": "…", "label": "false_positive", "family": "pii"}
    → {"request_id": "…", "label": "false_positive", "families": ["pii"], "policy": "chat/0123456789ab"}

What is counted is how often each family was wrong, and in which way; a request's family counts once for each label.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.routing import Route
from starlette.types import Receive, Scope

from aim_guardrail.audit.entry import Auditor
from aim_guardrail.detectors.families import FAMILIES
from aim_guardrail.json_endpoint import JsonEndpoint
from aim_guardrail.metrics import Metrics
from aim_guardrail.review.recent import Recent, Remembered
from aim_kserve.errors import BadRequest, NotFound
from aim_kserve.http import check_media, parse_object, read_body
from aim_kserve.identity import current_caller

PATH = "/feedback"
#: What a false negative is of where nobody says.
ANY = "any"
_MAX_BODY_BYTES = 4096


class Feedback(BaseModel):
    """What is said.

    Attributes:
        family: by default those that were found; of a false negative, any.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    request_id: str = Field(min_length=1, max_length=128)
    label: Literal["false_positive", "false_negative"]
    family: str | None = None


def feedback_routes(recent: Recent, metrics: Metrics, auditors: Sequence[Auditor]) -> list[Route]:
    """What the server is given beside KServe's routes."""

    async def serve(scope: Scope, receive: Receive) -> dict[str, Any]:
        body = await read_body(receive, _MAX_BODY_BYTES)
        check_media(scope["headers"], body)
        said = _read(body)
        known = _about(said, recent)
        families = _families(said, known)
        for family in families:
            if (family, said.label) not in known.told:
                known.told.add((family, said.label))
                metrics.fed_back(family, said.label)
        answer = {"request_id": said.request_id, "label": said.label, "families": families, "policy": known.policy}
        for auditor in auditors:
            await auditor.fed_back(known.tenant, answer)
        return answer

    return [Route(PATH, JsonEndpoint(serve), methods=["POST"])]


def _read(body: bytes) -> Feedback:
    try:
        return Feedback.model_validate(parse_object(body))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the body"
        known = f": known are {', '.join(Feedback.model_fields)}" if first["type"] == "extra_forbidden" else ""
        raise BadRequest(f"{where}: {first['msg'][0].lower()}{first['msg'][1:]}{known}", param=where) from None


def _about(said: Feedback, recent: Recent) -> Remembered:
    """The request it is about. Others' are as unknown as those that never were. Raises NotFound."""
    known, caller = recent.get(said.request_id), current_caller()
    is_theirs = known is not None and (caller is None or caller.may("admin") or caller.tenant == known.tenant)
    if known is None or not is_theirs:
        raise NotFound(
            "request_id: no request of late has that id, in this replica: give the x-request-id of its answer",
            param="request_id",
            code="request_not_found",
        )
    return known


def _families(said: Feedback, known: Remembered) -> list[str]:
    """Whose verdict was wrong. Raises BadRequest."""
    if said.family is not None and said.family not in FAMILIES:
        raise BadRequest(f"family: {said.family[:80]!r} is none: use one of {', '.join(FAMILIES)}", param="family")
    if said.label == "false_negative":
        return [said.family or ANY]
    wrong = sorted(known.families if said.family is None else known.families & {said.family})
    if not wrong:
        found = ", ".join(sorted(known.families)) or "nothing"
        raise BadRequest(f"family: found in that request was {found}: no verdict on it was a false positive")
    return wrong
