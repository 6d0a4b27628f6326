"""What pods of a job tell, over HTTPS: how far they are, and what they published. Served by every replica.

A pod shows a token of its own that is good for us alone; the API server says whose it is, and the pod's label whose
pod. It can tell of that job and of no other.
"""

from __future__ import annotations

import json
import logging
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aiohttp import web
from lightkube import ApiError

from aim_operator.cluster import CONFIG_MAPS, FINE_TUNING_JOBS, PODS, TOKEN_REVIEWS, TROUBLE, Cluster, Object
from aim_operator.settings import CERTIFICATE, KEY
from aim_profile.errors import AimProfileError
from aim_profile.serving.files import read

from . import serving
from .objects import AUDIENCE, JOB_LABEL

_LOG = logging.getLogger(__name__)
_MOST_BYTES = 256 * 1024
_LONGEST_URI = 2048
_POD = "authentication.kubernetes.io/pod-name"
_USER = "system:serviceaccount:"
_TOLD = ("progressPercentage", "estimatedRemainingSeconds", "metrics", "lastUpdatedTime")


class Refused(Exception):
    """A request that is not taken: code and why."""

    def __init__(self, code: int, why: str) -> None:
        self.code = code
        super().__init__(why)


class Server:
    """The server. Certificates are read when it starts."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._runner: web.AppRunner | None = None

    async def serve(self, host: str, port: int, certificates: Path) -> int:
        """The port it listens on. Raises OSError."""
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(certificates / CERTIFICATE, certificates / KEY)
        application = web.Application(client_max_size=_MOST_BYTES)
        path = "/namespaces/{namespace}/finetuningjobs/{name}"
        application.add_routes(
            [web.post(f"{path}/status", self._status), web.post(f"{path}/published", self._published)]
        )
        self._runner = web.AppRunner(application, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, host, port, ssl_context=tls).start()
        return int(self._runner.addresses[0][1])

    async def close(self) -> None:
        """Requests under way may end."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def _status(self, request: web.Request) -> web.Response:
        return await self._answered(request, self._keep_status)

    async def _published(self, request: web.Request) -> web.Response:
        return await self._answered(request, self._keep_published)

    async def _answered(self, request: web.Request, keep: Any) -> web.Response:
        name, namespace = request.match_info["name"], request.match_info["namespace"]
        try:
            await self._let_in(request, name, namespace)
            await keep(name, namespace, await _body(request))
        except Refused as refused:
            return web.json_response({"message": str(refused)}, status=refused.code)
        except TROUBLE as error:
            code = error.status.code if isinstance(error, ApiError) and error.status.code == 422 else 503
            return web.json_response({"message": str(error)}, status=code)
        return web.json_response({})

    async def _let_in(self, request: web.Request, name: str, namespace: str) -> None:
        kind, _, token = request.headers.get("Authorization", "").partition(" ")
        if kind.lower() != "bearer" or not token:
            raise Refused(401, "Authorization: Bearer with the pod's token for aim-operator")
        review = {"spec": {"token": token, "audiences": [AUDIENCE]}, "metadata": {}}
        body = {"apiVersion": TOKEN_REVIEWS.api_version, "kind": TOKEN_REVIEWS.kind, **review}
        status = (await self._cluster.create(TOKEN_REVIEWS, body) or {}).get("status") or {}
        if not status.get("authenticated") or AUDIENCE not in (status.get("audiences") or ()):
            raise Refused(401, "the token is not one for aim-operator")
        user = status.get("user") or {}
        pods = (user.get("extra") or {}).get(_POD) or ()
        if not pods or not str(user.get("username", "")).startswith(f"{_USER}{namespace}:"):
            raise Refused(403, f"the token is of no pod in {namespace}")
        pod = await self._cluster.get(PODS, pods[0], namespace)
        if pod is None or (pod["metadata"].get("labels") or {}).get(JOB_LABEL) != name:
            raise Refused(403, f"pod {pods[0]} is none of job {name}")

    async def _keep_status(self, name: str, namespace: str, body: Mapping[str, Any]) -> None:
        told = body.get("trainerStatus")
        if not isinstance(told, dict):
            raise Refused(422, "trainerStatus: is missing")
        status = {key: told[key] for key in _TOLD if key in told}
        # An ETA that is not told any more is not known any more.
        whole = {**dict.fromkeys(_TOLD), **status}
        await self._cluster.patch(FINE_TUNING_JOBS, name, {"status": {"trainerStatus": whole}}, namespace, status=True)

    async def _keep_published(self, name: str, namespace: str, body: Mapping[str, Any]) -> None:
        uri, profile = body.get("uri"), body.get("profile")
        if not isinstance(uri, str) or not 0 < len(uri) <= _LONGEST_URI:
            raise Refused(422, f"uri: text of at most {_LONGEST_URI} characters")
        job = await self._cluster.get(FINE_TUNING_JOBS, name, namespace)
        if job is None:
            raise Refused(404, f"no job {namespace}/{name}")
        if profile is not None:
            await self._cluster.apply(CONFIG_MAPS, _kept(job, uri, profile))
        await self._cluster.patch(FINE_TUNING_JOBS, name, {"status": {"published": uri}}, namespace, status=True)


def _kept(job: Object, uri: str, profile: object) -> Object:
    try:
        read(str(profile), serving.FILE)
    except AimProfileError as problem:
        raise Refused(422, f"profile: {problem}") from problem
    return serving.config_map(job, uri, str(profile))


async def _body(request: web.Request) -> Mapping[str, Any]:
    try:
        found = json.loads(await request.read())
    except ValueError as problem:
        raise Refused(422, f"not JSON: {problem}") from problem
    if not isinstance(found, dict):
        raise Refused(422, "not a JSON object")
    return found
