"""Which model a request is for, where its caller may use some only and nobody behind us knows callers.

A predictor that gets the client's credential asks itself; in front of any other, what a key may use is decided here, by
the name that is asked for.
"""

from __future__ import annotations

import re
from typing import Any

from aim_kserve.errors import BadRequest, NotFound
from aim_kserve.http import parse_object
from aim_kserve.identity import current_caller
from aim_kserve.identity.permission import check_use, may_use
from aim_kserve.identity.routes import lenient

_NAMED = re.compile(
    r"(?:/openai)?/v[12]/models/(?P<name>.+?)"
    r"(?::predict|:explain|(?:/versions/[^/]+)?(?:/infer|/ready|/generate|/generate_stream|/config|/stats))?",
    re.IGNORECASE,
)


def is_restricted() -> bool:
    """Whether whoever asks may use some models only."""
    caller = current_caller()
    return caller is not None and caller.models is not None


def check_asked(path: str, body: bytes, own: str) -> None:
    """Args:
        body: JSON as the predictor gets it, or raw tensors, whose path names the model.
        own: the predictor's model, for a request that names none.

    Raises:
        Forbidden: whoever asks may not use the model that is meant.
        BadRequest: the body is to name it, and is none that every server reads alike.
        NotFound: the path is spelt so that two servers may read two.
    """
    if lenient(path) != path.lower():
        raise NotFound(f"no such route: {path}: write it without needless slashes, dots and percent signs")
    check_use(model_of_path(path) or _in_body(body) or own)


def names_model(path: str) -> bool:
    """Whether a path says which model is meant, whatever the body says."""
    return model_of_path(path) is not None


def model_of_path(path: str) -> str | None:
    """The model that a route names; None where its body does."""
    named = _NAMED.fullmatch(path)
    return named["name"] if named else None


def _in_body(body: bytes) -> str | None:
    if not body:
        return None
    name = parse_object(body).get("model")
    if not (name is None or isinstance(name, str)):
        raise BadRequest("model: must be a string", param="model")
    return name


def usable_only(listed: Any) -> bool:
    """Take out of a body of ``/v1/models`` what whoever asks may not use; whether anything was."""
    changed = False
    for field in ("data", "models") if isinstance(listed, dict) else ():
        cards = listed.get(field)
        if isinstance(cards, list):
            kept = [card for card in cards if may_use(str(card.get("id") if isinstance(card, dict) else card))]
            changed = changed or len(kept) < len(cards)
            listed[field] = kept
    return changed
