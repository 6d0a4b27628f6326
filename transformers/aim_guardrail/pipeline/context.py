"""What is known of a request before its body is read."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Self

from aim_guardrail.asked import model_of_path
from aim_kserve.access import log_if_any
from aim_kserve.http import header
from aim_kserve.identity import Caller, current_caller


@dataclass(frozen=True, slots=True)
class RequestContext:
    """Who asks what, from where: what judging a request's texts may depend on beside them.

    Attributes:
        route: the path it came on; over gRPC, that of V2's REST route.
        model: the one its route names; None where its body does.
        caller: whose credential it came with; None where none is asked for.
        client: the address it came from, as the access log has it; None where that is not known.
        body_bytes: how large its body says it is; None where it does not say.
        request_id: as the client is told it; "" outside any request.
        arrived_s: when, by ``time.monotonic``: what a deadline counts from.
    """

    route: str
    model: str | None = None
    caller: Caller | None = None
    client: str | None = None
    body_bytes: int | None = None
    request_id: str = ""
    arrived_s: float = field(default_factory=time.monotonic)

    @property
    def tenant(self) -> str | None:
        """Whose policy applies; None where nobody is asked who it is."""
        return None if self.caller is None else self.caller.tenant

    @classmethod
    def of(cls, route: str, headers: Iterable[tuple[bytes, bytes]], client: str | None) -> Self:
        """The context of the request being served, which came with these headers."""
        length = header(headers, b"content-length")
        size = int(length) if length.isdigit() else None
        log = log_if_any()
        return cls(route, model_of_path(route), current_caller(), client, size, log.request_id if log else "")
