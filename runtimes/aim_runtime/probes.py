"""``/healthz`` and ``/readyz`` in Kubernetes' own forms (https://kubernetes.io/docs/reference/using-api/health-checks/).

``/healthz``: is this process worth keeping. ``/readyz``: does every model that should answer do so; ``/readyz/NAME``:
does this one.
``?verbose`` lists the models with the reason of each that is not ready (not where probes alone need no credential);
``?exclude=NAME`` leaves one out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from aim_kserve.errors import NotFound, ServingError, Unavailable
from aim_kserve.identity.caller import is_nobody
from aim_kserve.identity.permission import tellable

#: Served name → why it is not ready, None if it is.
Refusals = Callable[[], Mapping[str, Unavailable | None]]
#: The same of any name that a request may ask for. Raises ServingError where there is none.
RefusalOf = Callable[[str], ServingError | None]


class Probed(Protocol):
    """What is asked of the server as a whole."""

    def alive(self) -> bool: ...

    def refusal(self) -> Unavailable | None: ...


def probe_routes(server: Probed, refusals: Refusals, refusal_of: RefusalOf) -> list[BaseRoute]:
    """For the router; ``refusals`` is asked at every probe, ``refusal_of`` for one name."""
    probes = _Probes(server, refusals, refusal_of)
    return [
        Route("/healthz", probes.live, methods=["GET"]),
        Route("/readyz", probes.ready, methods=["GET"]),
        Route("/readyz/{name:path}", probes.ready_one, methods=["GET"]),
    ]


class _Probes:
    def __init__(self, server: Probed, refusals: Refusals, refusal_of: RefusalOf) -> None:
        self._server = server
        self._refusals = refusals
        self._refusal_of = refusal_of

    async def live(self, _: Request) -> Response:
        """503 only where nothing but a new process helps: a model that loads is no reason to end this one."""
        if self._server.alive():
            return PlainTextResponse("ok")
        return PlainTextResponse("healthz check failed: every engine is dead or stands still", 503)

    async def ready(self, request: Request) -> Response:
        """Whether every model is ready, those aside that `exclude` names; `verbose` tells each."""
        excluded = set(request.query_params.getlist("exclude"))
        checks = {name: refusal for name, refusal in self._refusals().items() if name not in excluded}
        failed = next(filter(None, checks.values()), None) if checks or excluded else self._server.refusal()
        if "verbose" in request.query_params and not is_nobody():
            return _verbose(checks, failed)
        return PlainTextResponse("ok") if failed is None else _refused(failed)

    async def ready_one(self, request: Request) -> Response:
        """Whether one model is ready, and why not."""
        name = request.path_params["name"]
        try:
            refusal = self._refusal_of(name)
        except NotFound:
            there = tellable(self._refusals())
            return PlainTextResponse(
                f"no model {name!r} is served here" + (f"; there are: {there}" if there else ""), 404
            )
        except ServingError as error:
            refusal = error
        return PlainTextResponse("ok") if refusal is None else _refused(refusal)


def _refused(refusal: ServingError) -> Response:
    return PlainTextResponse(refusal.message, refusal.status, refusal.headers())


def _verbose(checks: Mapping[str, Unavailable | None], failed: Unavailable | None) -> Response:
    lines = [f"[-]{name} failed: {why.message}" if why else f"[+]{name} ok" for name, why in checks.items()]
    if failed is None:
        return PlainTextResponse("\n".join([*lines, "readyz check passed"]))
    if not checks:
        lines = [failed.message]
    return PlainTextResponse("\n".join([*lines, "readyz check failed"]), 503, failed.headers())
