"""A refusal on its way from the engine's process to ours: all of a ServingError travels."""

from __future__ import annotations

from aim_kserve import errors
from aim_kserve.errors import ServingError

from .frames import Failed, Spent

#: Those that can be made again of what travels. The others are the server's own (who may ask); one of an engine would
#: arrive as a ServingError of its status, type and headers.
_KINDS: dict[str, type[ServingError]] = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, ServingError) and kind.__init__ is ServingError.__init__
}


def to_frame(call: int, error: ServingError, spent: Spent) -> Failed:
    """``error`` in words: by the nearest of its classes that both sides know."""
    kind = next(base.__name__ for base in type(error).__mro__ if _KINDS.get(base.__name__) is base)
    return Failed(
        call,
        kind,
        error.message,
        error.status,
        error.type,
        error.param,
        error.code,
        error.retry_after_s,
        error.headers(),
        spent,
    )


class _Told:
    """Headers of an error whose own class is unknown here."""

    def __init__(self, headers: dict[str, str]) -> None:
        self._headers = headers

    def __call__(self) -> dict[str, str]:
        return dict(self._headers)


def from_frame(failed: Failed) -> ServingError:
    """The error again."""
    error = _KINDS.get(failed.kind, ServingError)(
        failed.message,
        param=failed.param,
        code=failed.code,
        status=failed.status,
        retry_after_s=failed.retry_after_s,
    )
    error.retry_after_s = failed.retry_after_s
    if error.type != failed.error_type:
        error.type = failed.error_type
    if error.headers() != failed.headers:
        error.headers = _Told(failed.headers)  # type: ignore[method-assign]
    return error
