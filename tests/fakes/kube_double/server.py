"""The HTTP side: paths to keys, verbs to the store, watches as streams."""

from __future__ import annotations

import asyncio
import json
import uuid
from typing import Any, NamedTuple

import yaml
from aiohttp import web

from . import patches
from .admission import Asked, admitted
from .discovery import discovered
from .faults import Faults
from .kinds import Kind
from .refusal import NoSuchPath, Refusal, not_found
from .selectors import by_query
from .store import Change, Expired, Key, Object, Store
from .tables import as_table

_EXPIRED = Refusal(410, "Expired", "too old resource version")


class _Target(NamedTuple):
    kind: Kind
    namespace: str
    name: str
    subresource: str

    @property
    def key(self) -> Key:
        return Key(self.kind.group_version, self.kind.plural, self.namespace if self.kind.namespaced else "", self.name)


class Server:
    """Answers as an API server does. requests: `METHOD path` of every request but watches and discovery, in turn."""

    def __init__(self) -> None:
        self.store = Store()
        self.faults = Faults()
        self.requests: list[str] = []
        self._closing = asyncio.Event()

    def application(self) -> web.Application:
        application = web.Application(client_max_size=2**24)
        application.router.add_route("*", "/{path:.*}", self._answer)
        return application

    def close_watches(self) -> None:
        """Ends every open watch, as a server does now and then."""
        self._closing.set()
        self._closing = asyncio.Event()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        try:
            return await self._served(request)
        except NoSuchPath:
            return web.Response(text="404 page not found\n", status=404)
        except Refusal as refusal:
            return _json(refusal.status(), refusal.code)

    async def _served(self, request: web.Request) -> web.StreamResponse:
        path = request.path.rstrip("/")
        if path in ("/readyz", "/livez", "/healthz"):
            return web.Response(text="ok")
        if (found := discovered(self.store.kinds, path)) is not None:
            return _json(found)
        target = self._target(path)
        if request.method == "GET" and not target.name:
            if request.query.get("watch") in ("1", "true"):
                return await self._watch(request, target)
            self.requests.append(f"GET {path}")
            return _json(self._listed(request, target))
        self.requests.append(f"{request.method} {path}")
        self.faults.check(target.kind.plural, request.method)
        if request.method == "GET":
            found = self.store.get(target.key)
            return _json(as_table(target.kind, [found], request) or found)
        return await self._written(request, target)

    def _target(self, path: str) -> _Target:
        parts = [part for part in path.split("/") if part]
        group_version, parts = (parts[1], parts[2:]) if parts[:1] == ["api"] else ("/".join(parts[1:3]), parts[3:])
        namespace = ""
        if parts[:1] == ["namespaces"] and len(parts) > 2 and parts[2] not in ("status", "finalize"):
            namespace, parts = parts[1], parts[2:]
        kind = self.store.kinds.get(group_version, parts[0] if parts else "")
        name, subresource, *_ = [*parts[1:], "", ""]
        return _Target(kind, namespace, name, subresource)

    # --- reading

    def _listed(self, request: web.Request, target: _Target) -> Any:
        labels, fields = request.query.get("labelSelector", ""), request.query.get("fieldSelector", "")
        items = [each for each in self.store.of_kind(target.kind, target.namespace) if by_query(each, labels, fields)]
        metadata = {"resourceVersion": self.store.version}
        listed = {"kind": f"{target.kind.name}List", "apiVersion": target.kind.group_version, "metadata": metadata}
        return as_table(target.kind, items, request) or {**listed, "items": items}

    async def _watch(self, request: web.Request, target: _Target) -> web.StreamResponse:
        if request.query.get("sendInitialEvents") == "true":
            # As a server without WatchList says it: clients then list first. Unsaid, kubectl waits for a bookmark.
            raise Refusal(422, "Invalid", "sendInitialEvents: Forbidden: needs the feature gate WatchList")
        response = web.StreamResponse(headers={"content-type": "application/json"})
        await response.prepare(request)
        closing = asyncio.ensure_future(self._closing.wait())
        sending = asyncio.ensure_future(self._send_changes(request, target, response))
        try:
            limit = float(request.query.get("timeoutSeconds", 300))
            await asyncio.wait({closing, sending}, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        finally:
            closing.cancel()
            sending.cancel()
        return response

    async def _send_changes(self, request: web.Request, target: _Target, response: web.StreamResponse) -> None:
        since = request.query.get("resourceVersion") or "0"

        async def send(what: str, found: Object) -> None:
            await response.write(json.dumps({"type": what, "object": found}).encode() + b"\n")

        try:
            if since == "0":
                since = self.store.version
                for found in self._listed(request, target)["items"]:
                    await send("ADDED", found)
            async for change in self.store.changes(int(since)):
                if what := _seen_as(change, target, request):
                    await send(what, change.object)
        except Expired:
            await send("ERROR", _EXPIRED.status())
        except (ConnectionError, asyncio.CancelledError):
            pass  # whoever watched is gone

    # --- writing

    async def _written(self, request: web.Request, target: _Target) -> web.Response:
        dry_run = "All" in request.query.getall("dryRun", [])
        text = await request.text()
        if request.method == "DELETE":
            return _json(await self._deleted(request, target, dry_run))
        # JSON is YAML, but takes YAML's reader a hundred times as long; kubectl applies YAML.
        data = json.loads(text) if text.lstrip().startswith(("{", "[")) else yaml.safe_load(text)
        if target.subresource == "eviction":
            self.store.get(target.key)
            await self._stored(request, lambda: self.store.delete(target.key), target.kind)
            return _json({"kind": "Status", "apiVersion": "v1", "status": "Success"}, status=201)
        if request.method == "POST":
            return _json(await self._created(request, target, data, dry_run), status=201)
        old = self.store.objects.get(target.key)
        is_apply = "apply-patch" in request.content_type
        if old is None and not is_apply:
            raise not_found(target.kind.plural, target.name)
        new = self._changed(request, target, old, data)
        new["metadata"] |= {"name": target.name} | ({"namespace": target.namespace} if target.kind.namespaced else {})
        stored = await self._admitted(request, target, new, old, dry_run, written=not is_apply)
        return _json(stored, status=200 if old else 201)

    def _changed(self, request: web.Request, target: _Target, old: Object | None, data: Any) -> Object:
        if request.method == "PUT":
            return dict(data)
        if "json-patch" in request.content_type:
            return patches.edited(old or {}, data)
        if "apply-patch" in request.content_type:
            force = request.query.get("force") == "true"
            return patches.applied(old, data, _manager(request), target.subresource, force=force)
        merged: Object = patches.merged(old, data)
        return merged

    async def _created(self, request: web.Request, target: _Target, data: Object, dry_run: bool) -> Object:
        metadata = data.setdefault("metadata", {})
        if not metadata.get("name"):
            metadata["name"] = metadata.get("generateName", "") + uuid.uuid4().hex[:5]
        for server_side in ("resourceVersion", "uid"):
            metadata.pop(server_side, None)
        if target.kind.namespaced:
            metadata["namespace"] = target.namespace
            self.store.get(Key("v1", "namespaces", "", target.namespace))
        target = target._replace(name=metadata["name"])
        if target.key in self.store.objects:
            raise Refusal(409, "AlreadyExists", f'{target.kind.plural} "{target.name}" already exists')
        return await self._admitted(request, target, data, None, dry_run, written=True)

    async def _admitted(
        self, request: web.Request, target: _Target, new: Object, old: Object | None, dry_run: bool, *, written: bool
    ) -> Object:
        """The object through schema, webhooks and schema again into the store. written: not by an apply patch."""
        kind, subresource = target.kind, target.subresource
        ready = self.store.prepared(kind, new, old, subresource)
        changed = await admitted(self.store, Asked(kind, ready, old, subresource, dry_run))
        if self.store.objects.get(target.key) is not old:
            # Somebody wrote while the webhooks were asked: a real server's compare-and-swap fails, too.
            raise Refusal(409, "Conflict", f'{kind.plural} "{target.name}": the object has been modified')
        ready = self.store.prepared(kind, changed or ready, old, subresource)
        if written:
            patches.owned_by_writer(old, ready, _manager(request), subresource)
        if dry_run:
            return ready
        stored: Object = await self._stored(request, lambda: self.store.put(target.key, ready), kind)
        return stored

    async def _deleted(self, request: web.Request, target: _Target, dry_run: bool) -> Object:
        if not target.name:
            for found in list(self._listed(request, target)["items"]):
                metadata = found["metadata"]
                one = target._replace(name=metadata["name"], namespace=metadata.get("namespace", ""))
                await self._deleted(request, one, dry_run)
            return {"kind": "Status", "apiVersion": "v1", "status": "Success", "metadata": {}}
        old = self.store.get(target.key)
        await admitted(self.store, Asked(target.kind, None, old, dry_run=dry_run))
        if dry_run or target.key not in self.store.objects:
            return old
        deleted: Object = await self._stored(request, lambda: self.store.delete(target.key), target.kind)
        return deleted

    async def _stored(self, request: web.Request, store: Any, kind: Kind) -> Any:
        """Does it, and where a test asked for that, something else before anybody hears of it."""
        injected = self.faults.to_call(kind.plural, request.method)
        if injected is None:
            return store()
        self.store.held_back.add(kind.plural)
        try:
            result = store()
            await self.faults.call(injected)
            return result
        finally:
            self.store.held_back.discard(kind.plural)
            self.store.wake()


def _json(body: Any, status: int = 200) -> web.Response:
    """Clients compare the content type letter by letter: no charset in it."""
    return web.Response(body=json.dumps(body).encode(), status=status, headers={"Content-Type": "application/json"})


def _manager(request: web.Request) -> str:
    named = request.query.get("fieldManager")
    return named or request.headers.get("User-Agent", "unknown").partition("/")[0]


def _seen_as(change: Change, target: _Target, request: web.Request) -> str | None:
    """What a change is to a watch with selectors: what comes to match is added, what ceases to, deleted."""
    kind = target.kind
    if change.key[:2] != (kind.group_version, kind.plural) or target.namespace not in ("", change.key.namespace):
        return None
    labels, fields = request.query.get("labelSelector", ""), request.query.get("fieldSelector", "")
    matches = by_query(change.object, labels, fields)
    matched = change.before is not None and by_query(change.before, labels, fields)
    if not matches or change.type == "DELETED":
        return "DELETED" if matched else None
    return "MODIFIED" if matched else "ADDED"
