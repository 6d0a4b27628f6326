"""What a client is told when a request cannot be served.

::

    ServingError                  carries status, OpenAI type/code/param and Retry-After
    ├── BadRequest          400   the request is malformed: names the field, the value and the remedy
    │   └── ContentBlocked  400   a guardrail refused it: names the family, never the value
    ├── Unauthorized        401   no credential, or none that counts: names what is wrong with it, never itself
    ├── Forbidden           403   a credential that does not reach so far
    ├── NotFound            404   no such model or route
    ├── TooLarge            413   the body is larger than the server accepts
    ├── UnsupportedMedia    415   the body is no JSON, or compressed: names what is taken
    ├── Overloaded          429   full for this caller: Retry-After
    └── Unavailable         503   loading, draining, full or dead: Retry-After
        └── UpstreamFailed  502   the predictor answered something that is not an answer

``gRPC`` status codes follow google.rpc's own mapping of HTTP statuses.
"""

from __future__ import annotations

from typing import Any

from aim_kserve.redacted import redacted

GRPC_CODE_BY_STATUS = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    409: "ABORTED",
    412: "FAILED_PRECONDITION",
    413: "RESOURCE_EXHAUSTED",
    429: "RESOURCE_EXHAUSTED",
    499: "CANCELLED",
    501: "UNIMPLEMENTED",
    502: "UNAVAILABLE",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}


#: Of a message and of ``param``: both repeat words of the request, which may be of any length.
_MESSAGE_CHARACTERS, _PARAM_CHARACTERS = 2000, 400


class ServingError(Exception):
    """A refusal with everything a client needs to act on it.

    Args:
        message: one sentence naming the field, the value and the remedy.
        param: the request field at fault, OpenAI's ``error.param``.
        code: machine-readable reason, OpenAI's ``error.code``.
        status: HTTP status; defaults to the class's.
        retry_after_s: seconds for the ``Retry-After`` header.
    """

    status: int = 500
    type: str = "server_error"
    retry_after_s: float | None = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        status: int | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        self.message = _cut(redacted(message), _MESSAGE_CHARACTERS)
        super().__init__(self.message)
        self.param = None if param is None else _cut(redacted(param), _PARAM_CHARACTERS)
        self.code = code
        self.status = type(self).status if status is None else status
        self.retry_after_s = type(self).retry_after_s if retry_after_s is None else retry_after_s

    def body(self) -> dict[str, Any]:
        """The error in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Response headers that belong to the error (``Retry-After`` in whole seconds, rounded up)."""
        if self.retry_after_s is None:
            return {}
        return {"retry-after": str(max(1, -int(-self.retry_after_s // 1)))}

    @property
    def grpc_code(self) -> str:
        """Name of the ``grpc.StatusCode`` that says the same."""
        return GRPC_CODE_BY_STATUS.get(self.status, "INTERNAL" if self.status >= 500 else "FAILED_PRECONDITION")


def _cut(text: str, most: int) -> str:
    """``text``, without its middle if it is longer than ``most`` characters."""
    return text if len(text) <= most else f"{text[: most // 2]}...{text[-most // 2 :]}"


def internal_error() -> ServingError:
    """What a client is told of a fault of ours: nothing but where the cause is."""
    return ServingError("internal error: the server's log has the cause, by x-request-id")


class BadRequest(ServingError):
    status = 400
    type = "invalid_request_error"


class ContentBlocked(BadRequest):
    type = "content_filter"


class Unauthorized(ServingError):
    """Args: ``credential_id``: whose it would be, where it is proven to be theirs."""

    status = 401
    type = "authentication_error"

    def __init__(self, message: str, *, code: str, credential_id: str | None = None) -> None:
        super().__init__(message, code=code)
        self.credential_id = credential_id

    def headers(self) -> dict[str, str]:
        """How to do better: https://www.rfc-editor.org/rfc/rfc6750#section-3."""
        said = "" if self.code == "missing_credential" else ', error="invalid_token"'
        return {**super().headers(), "www-authenticate": f'Bearer realm="aim"{said}'}


class Forbidden(ServingError):
    """Args: ``scope``: what the credential lacks, where that is a scope."""

    status = 403
    type = "permission_error"

    def __init__(self, message: str, *, code: str, scope: str | None = None, param: str | None = None) -> None:
        super().__init__(message, code=code, param=param)
        self.scope = scope

    def headers(self) -> dict[str, str]:
        said = f', scope="{self.scope}"' if self.scope else ""
        return {**super().headers(), "www-authenticate": f'Bearer realm="aim", error="insufficient_scope"{said}'}


class NotFound(ServingError):
    status = 404
    type = "invalid_request_error"


class TooLarge(ServingError):
    status = 413
    type = "invalid_request_error"


class UnsupportedMedia(ServingError):
    status = 415
    type = "invalid_request_error"

    def headers(self) -> dict[str, str]:
        """What is taken: https://www.rfc-editor.org/rfc/rfc9110#section-15.5.16."""
        return {**super().headers(), "accept-encoding": "identity"}


class Overloaded(ServingError):
    status = 429
    type = "rate_limit_error"
    retry_after_s = 1


class Unavailable(ServingError):
    status = 503
    type = "service_unavailable"
    retry_after_s = 1


class UpstreamFailed(Unavailable):
    status = 502
    type = "upstream_error"


class StartupError(Exception):
    """The process cannot serve: one line that says what is wrong and where. Ends it with exit 1."""

    def __init__(self, message: str) -> None:
        super().__init__(redacted(message))


class ShutdownError(Exception):
    """A part of the process does not end: one line that says which. The process ends without it, with exit 1."""
