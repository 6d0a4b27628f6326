"""A caller, as every room above sees one: what may be asked, of which models, and how urgently."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final, Literal, NamedTuple

Scope = Literal["infer", "admin", "metrics", "filter"]
#: How urgent a request is; ``high`` is served first.
QosClass = Literal["high", "medium", "low"]


@dataclass(frozen=True, slots=True)
class Caller:
    """What a credential says of whoever sent it.

    ``credential_id``: names the credential in logs and metrics, and is no secret: the key's id, a token's subject.
    ``tenant``: who pays; fairness and limits are by tenant. ``qos_class``: the highest it may ask for; None: the
    model's own. ``models``: patterns (``fnmatch``) of served names; None: all.
    """

    credential_id: str
    tenant: str
    scopes: frozenset[Scope]
    qos_class: QosClass | None = None
    models: tuple[str, ...] | None = None

    def may(self, scope: Scope) -> bool:
        """Whether it has that scope."""
        return scope in self.scopes

    def may_use(self, model: str) -> bool:
        """Whether it may ask the model served under that name."""
        return self.models is None or any(fnmatchcase(model, pattern) for pattern in self.models)


class Verified(NamedTuple):
    """A caller, and until when its credential says so (seconds since the epoch)."""

    caller: Caller
    until: float


#: Who asks on an open route, where others are closed.
NOBODY: Final = Caller("", "", frozenset())

_current: ContextVar[Caller | None] = ContextVar("aim.caller", default=None)


def current_caller() -> Caller | None:
    """Who sent the request being served; None where identity is off, on an open route, and outside any request."""
    caller = _current.get()
    return None if caller is NOBODY else caller


def is_nobody() -> bool:
    """Whether whoever asks had no need to say who it is, where others have: what there is, is not for everybody."""
    return _current.get() is NOBODY


def set_caller(caller: Caller | None) -> None:
    """Say who it is, once its credential has been verified."""
    _current.set(caller)
