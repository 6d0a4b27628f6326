"""A Kubernetes API for tests: a double of it, or a real one.

    with cluster(tmp_path) as kubernetes:                     # the fixture `kubernetes` of tests/operator/conftest.py
        kubernetes.define(crd)
        kubernetes.kubectl("apply", "-f", "-", stdin=yaml)    # the real kubectl; raises KubectlFailed with what it said
        kubernetes.patch("/api/v1/nodes/n1/status", {"status": {…}})   # a merge patch; plays kubelet, KServe, Ray
        kubernetes.wait_for("/api/v1/nodes", "n1", lambda node: "taints" in node["spec"])   # by a watch, no sleep
        kubernetes.double.faults.conflicts("nodes", 5)        # the next five updates: 409
        kubernetes.double.faults.after_write("nodes", "PATCH", operator.kill)   # stored, and nobody heard of it
        kubernetes.expire_watches()                           # 410 for every watch
        kubernetes.double.requests                            # `METHOD path`, in turn: what was asked, and how often

Processes under test get `kubernetes.environment`. The double keeps to what operators lean on: uid, generation,
resourceVersion, 409 for stale writes and compare-and-swap around webhooks, finalizers, owner references, status as a
resource of its own, selectors, watches with 410, merge, JSON and apply patches, dryRun, structural schemas (refused
where they are not) with defaults, pruning and CEL with oldSelf, printer columns, eviction, webhooks over TLS.

It has none of: RBAC and authentication, list-map keys in apply and strategic patches, CEL's cost limits and Kubernetes'
own CEL functions, OpenAPI (kubectl runs with --validate=false), conversion between versions, pagination, webhooks by
service, and every controller but the collector: no scheduler, no kubelet. Those are a test's to play, here and there.

A real server instead (`pytest -m cluster`): kube_double/real.py.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml
from aiohttp import web

from .real import real_server
from .server import Server

Object = dict[str, Any]
DEFINITIONS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
#: How long a test waits for what must come about, seconds: far longer than it ever takes.
_PATIENCE_S = 120


class KubectlFailed(Exception):
    """kubectl ended with another code than 0. The message is what it wrote to stderr."""


class Cluster:
    """One API, with kubectl beside it. url: plain HTTP, of the double or of `kubectl proxy`."""

    def __init__(
        self,
        url: str,
        kubeconfig: Path,
        server: Server | None = None,
        loop: asyncio.AbstractEventLoop | None = None,
        restart: Callable[[], None] | None = None,
    ) -> None:
        self.url, self.kubeconfig = url, kubeconfig
        self._server, self._loop, self._restart = server, loop, restart
        self._http = httpx.Client(base_url=url, timeout=_PATIENCE_S)

    @property
    def double(self) -> Server:
        if self._server is None:
            raise AssertionError("a real server has no faults to inject: leave the marker `cluster` off this test")
        return self._server

    @property
    def collects(self) -> bool:
        """Whether what is owned goes with its owner: beside a real server alone there is nobody to see to it."""
        return self._server is not None

    @property
    def environment(self) -> dict[str, str]:
        """Of a process that shall speak to it."""
        return {**os.environ, "KUBECONFIG": str(self.kubeconfig), "HOME": str(self.kubeconfig.parent)}

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        """What kubectl wrote. Raises KubectlFailed."""
        told = ["--validate=false"] if self._server and arguments[0] in ("apply", "create", "replace") else []
        command = ["kubectl", arguments[0], *told, *arguments[1:]]
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, env=self.environment, check=False)
        if done.returncode:
            raise KubectlFailed(done.stderr.strip())
        return done.stdout

    def read(self, path: str, **query: str) -> Object:
        return self._asked("GET", path, params=query)

    def items(self, path: str, **query: str) -> list[Object]:
        found: list[Object] = self.read(path, **query)["items"]
        return found

    def exists(self, path: str) -> bool:
        return self._http.get(path).status_code != 404

    def create(self, path: str, body: Mapping[str, Any]) -> Object:
        return self._asked("POST", path, json=body)

    def define(self, definition: Mapping[str, Any]) -> None:
        """A CustomResourceDefinition, and its kind is served when this returns: a server does not have it at once."""
        self.create(DEFINITIONS, definition)
        spec, name = definition["spec"], definition["metadata"]["name"]
        served = (each["name"] for each in spec["versions"] if each.get("served", True))
        paths = [f"/apis/{spec['group']}/{version}/{spec['names']['plural']}" for version in served]
        self.wait_for(DEFINITIONS, name, lambda found: _holds(found, "Established"))
        until = time.monotonic() + _PATIENCE_S
        while not all(map(self.exists, paths)):
            assert time.monotonic() < until, f"{name} is established, and not served"
            time.sleep(0.05)  # nobody tells when

    def replace(self, path: str, body: Mapping[str, Any]) -> Object:
        return self._asked("PUT", path, json=body)

    def patch(self, path: str, body: Mapping[str, Any]) -> Object:
        """A merge patch."""
        headers = {"content-type": "application/merge-patch+json"}
        return self._asked("PATCH", path, content=json.dumps(body), headers=headers)

    def delete(self, path: str) -> Object:
        return self._asked("DELETE", path)

    def _asked(self, method: str, path: str, **request: Any) -> Object:
        """Raises httpx.HTTPStatusError; its response says why."""
        response = self._http.request(method, path, **request)
        try:
            response.raise_for_status()
        except httpx.HTTPStatusError as error:
            error.add_note(response.text[:2000])
            raise
        answer: Object = response.json()
        return answer

    def wait_for(self, path: str, name: str, holds: Callable[[Object], bool]) -> Object:
        """The object of the collection at `path` once it is as asked for. Raises AssertionError: it never was."""
        seen: Object | None = None
        for seen in self._states(path, name):
            if seen is not None and holds(seen):
                return seen
        raise AssertionError(f"{path}/{name} never came to be so; it is {json.dumps(seen, indent=1)}")

    def wait_gone(self, path: str, name: str) -> None:
        """Returns once no such object is there."""
        for seen in self._states(path, name):
            if seen is None:
                return
        raise AssertionError(f"{path}/{name} is still there")

    def _states(self, path: str, name: str) -> Iterator[Object | None]:
        """What it is and becomes, for as long as a test waits; None: it is not there.

        Listed, then watched from there, and anew where a watch ends, as clients do: one that names no version has to
        wait until a server's cache is as new as its storage, which an old etcd does not tell while others are written.
        """
        until = time.monotonic() + _PATIENCE_S
        picked = {"fieldSelector": f"metadata.name={name}"}
        while (left := until - time.monotonic()) > 0:
            listed = self.read(path, **picked)
            yield next(iter(listed["items"]), None)
            query = {**picked, "watch": "1", "timeoutSeconds": str(int(left) + 1)}
            query["resourceVersion"] = listed["metadata"]["resourceVersion"]
            with self._http.stream("GET", path, params=query) as response:
                for line in response.iter_lines():
                    told = json.loads(line)
                    if told["type"] == "ERROR":
                        break
                    yield None if told["type"] == "DELETED" else told["object"]

    def expire_watches(self) -> None:
        """Every watch is told 410 and must list anew."""
        if self._restart is not None:
            self._restart()
        else:
            self._in_loop(self.double.store.forget_log)

    @contextmanager
    def contended(self, *paths: str) -> Iterator[None]:
        """Others write these objects: updates of what was read before meet 409. The double refuses some of each."""
        if self._server is not None:
            for path in paths:
                self._server.faults.conflicts(path.split("/")[-2], 3)
            yield
            return
        stop = threading.Event()
        writer = threading.Thread(target=self._write_on, args=(paths, stop))
        writer.start()
        try:
            yield
        finally:
            stop.set()
            writer.join()

    def _write_on(self, paths: tuple[str, ...], stop: threading.Event) -> None:
        with httpx.Client(base_url=self.url, headers={"content-type": "application/merge-patch+json"}) as other:
            for number in itertools.count():
                if stop.wait(0.2):
                    return
                noted = {"metadata": {"annotations": {"test.example/written": str(number)}}}
                other.patch(paths[number % len(paths)], content=json.dumps(noted))

    def close_watches(self) -> None:
        """Every watch ends, as if its time were up."""
        self._in_loop(self.double.close_watches)

    def _in_loop(self, call: Callable[[], None]) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(call)

    def close(self) -> None:
        self._http.close()


def _holds(found: Object, condition: str) -> bool:
    told = found.get("status", {}).get("conditions") or ()
    return any(each["type"] == condition and each["status"] == "True" for each in told)


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """A real server where KUBEBUILDER_ASSETS names one, else the double. folder: for files of its own."""
    if assets := os.environ.get("KUBEBUILDER_ASSETS"):
        with real_server(Path(assets), folder) as server:
            found = Cluster(server.url, server.kubeconfig, restart=server.restart)
            try:
                yield found
            finally:
                found.close()
    else:
        with _double(folder) as found:
            yield found


@contextmanager
def _double(folder: Path) -> Iterator[Cluster]:
    """In a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    server, runner, url = asyncio.run_coroutine_threadsafe(_started(), loop).result()
    found = Cluster(url, _kubeconfig(folder / "kubeconfig", url), server, loop)
    try:
        yield found
    finally:
        found.close()
        loop.call_soon_threadsafe(server.close_watches)
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _started() -> tuple[Server, web.AppRunner, str]:
    server = Server()
    runner = web.AppRunner(server.application(), shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port, *_ = runner.addresses[0]
    return server, runner, f"http://{host}:{port}"


def _kubeconfig(file: Path, url: str) -> Path:
    name = "double"
    body = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": name, "cluster": {"server": url}}],
        "users": [{"name": name, "user": {}}],
        "contexts": [{"name": name, "context": {"cluster": name, "user": name, "namespace": "default"}}],
        "current-context": name,
    }
    file.write_text(yaml.safe_dump(body), encoding="utf-8")
    return file
