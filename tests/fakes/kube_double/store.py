"""What the cluster holds: objects by key, a log of what became of them, and who waits for more of it."""

from __future__ import annotations

import asyncio
import copy
import datetime
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any, Literal, NamedTuple

from .kinds import Kind, Kinds
from .refusal import Refusal, conflict, not_found
from .structural import pruned_and_defaulted, violations

Object = dict[str, Any]
_KEPT_METADATA = ("uid", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds", "name", "namespace")


class Key(NamedTuple):
    group_version: str
    plural: str
    namespace: str
    name: str


class Change(NamedTuple):
    version: int
    key: Key
    type: Literal["ADDED", "MODIFIED", "DELETED"]
    object: Object
    before: Object | None


class Expired(Exception):
    """A watcher's resourceVersion is older than what is remembered."""


class Store:
    """Objects, versions and changes. All calls from one event loop; nothing here awaits but `changes`."""

    def __init__(self) -> None:
        self.kinds = Kinds()
        self.objects: dict[Key, Object] = {}
        self._version = 1
        self._log: list[Change] = []
        self._forgotten = 0
        self._news = asyncio.Event()
        self.held_back: set[str] = set()
        for name in ("default", "kube-system"):
            self.put(
                Key("v1", "namespaces", "", name), {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}
            )

    @property
    def version(self) -> str:
        """resourceVersion of the newest change."""
        return str(self._version)

    def get(self, key: Key) -> Object:
        if key not in self.objects:
            raise not_found(key.plural, key.name)
        return self.objects[key]

    def of_kind(self, kind: Kind, namespace: str) -> Iterator[Object]:
        for key, found in self.objects.items():
            if key[:2] == (kind.group_version, kind.plural) and namespace in ("", key.namespace):
                yield found

    # --- writing

    def prepared(self, kind: Kind, new: Object, old: Object | None, subresource: str) -> Object:
        """What would be stored: status and spec each through their own door, defaults, pruning, schema, CEL rules.

        Raises Refusal: 409 for a stale resourceVersion, 422 for what the schema refuses.
        """
        new = copy.deepcopy(new)
        if old is not None:
            new = self._onto(kind, new, old, subresource)
        elif kind.has_status:
            new.pop("status", None)
        new |= {"apiVersion": kind.group_version, "kind": kind.name}
        if kind.schema is not None:
            new = pruned_and_defaulted(kind.schema, new)
            if found := violations(kind.schema, new, old):
                raise Refusal(422, "Invalid", f'{kind.name} "{new["metadata"]["name"]}" is invalid: {"; ".join(found)}')
        return new

    def _onto(self, kind: Kind, new: Object, old: Object, subresource: str) -> Object:
        sent = new["metadata"].get("resourceVersion")
        if sent and sent != old["metadata"]["resourceVersion"]:
            raise conflict(kind.plural, old["metadata"]["name"])
        if "uid" in new["metadata"] and new["metadata"]["uid"] != old["metadata"]["uid"]:
            raise conflict(kind.plural, old["metadata"]["name"])
        if subresource == "status" and kind.has_status:
            owners = {key: new["metadata"][key] for key in ("managedFields",) if key in new["metadata"]}
            new = copy.deepcopy(old) | {"status": new.get("status") or {}}
            new["metadata"] |= owners
        elif kind.has_status:
            new = {key: value for key, value in new.items() if key != "status"}
            new |= {"status": copy.deepcopy(old["status"])} if "status" in old else {}
        kept = {key: old["metadata"][key] for key in _KEPT_METADATA if key in old["metadata"]}
        # A deletion is asked for by DELETE alone.
        new["metadata"] = {key: value for key, value in new["metadata"].items() if key not in _KEPT_METADATA} | kept
        return new

    def put(self, key: Key, new: Object) -> Object:
        """Stores what `prepared` made. The last finalizer of an object that is being deleted ends it."""
        old = self.objects.get(key)
        new = copy.deepcopy(new)
        metadata = new["metadata"]
        if old is None:
            metadata |= {"uid": str(uuid.uuid4()), "generation": 1, "creationTimestamp": _now()}
        else:
            changed = _desired(new) != _desired(old)
            metadata["generation"] = old["metadata"].get("generation", 1) + changed
            metadata["resourceVersion"] = old["metadata"]["resourceVersion"]
            if _without_owners(new) == _without_owners(old):
                return old
        if old is not None and metadata.get("deletionTimestamp") and not metadata.get("finalizers"):
            return self._remove(key, new)
        return self._note(key, "MODIFIED" if old else "ADDED", new)

    def delete(self, key: Key) -> Object:
        """At once, or, where there are finalizers, when the last of them is gone."""
        found = copy.deepcopy(self.get(key))
        if not found["metadata"].get("finalizers"):
            return self._remove(key, found)
        if "deletionTimestamp" in found["metadata"]:
            return found
        found["metadata"] |= {"deletionTimestamp": _now(), "deletionGracePeriodSeconds": 0}
        return self._note(key, "MODIFIED", found)

    def _remove(self, key: Key, found: Object) -> Object:
        removed = self._note(key, "DELETED", found)
        uid = removed["metadata"]["uid"]
        owned = [
            other
            for other, each in self.objects.items()
            if any(owner["uid"] == uid for owner in each["metadata"].get("ownerReferences") or ())
            or (key.plural == "namespaces" and other.namespace == key.name)
        ]
        for other in owned:
            if other in self.objects:
                self._orphaned(other, uid)
        return removed

    def _orphaned(self, key: Key, uid: str) -> None:
        """The collector's way: goes with its last owner, else loses the reference."""
        left = [each for each in self.objects[key]["metadata"].get("ownerReferences") or () if each["uid"] != uid]
        if not left:
            self.delete(key)
        else:
            found = copy.deepcopy(self.objects[key])
            found["metadata"]["ownerReferences"] = left
            self._note(key, "MODIFIED", found)

    def _note(self, key: Key, what: Literal["ADDED", "MODIFIED", "DELETED"], new: Object) -> Object:
        self._version += 1
        new["metadata"]["resourceVersion"] = str(self._version)
        if key.plural == "customresourcedefinitions":
            self._defined(what, new)
        before = self.objects.get(key)
        if what == "DELETED":
            del self.objects[key]
        else:
            self.objects[key] = new
        self._log.append(Change(self._version, key, what, copy.deepcopy(new), before))
        self.wake()
        return new

    def _defined(self, what: str, crd: Object) -> None:
        if what == "DELETED":
            self.kinds.forget(crd)
            return
        self.kinds.define(crd)
        conditions = [{"type": name, "status": "True"} for name in ("Established", "NamesAccepted")]
        crd["status"] = {"conditions": conditions, "acceptedNames": crd["spec"]["names"]}

    # --- watching

    def wake(self) -> None:
        """Whoever waits for changes looks again."""
        self._news.set()
        self._news = asyncio.Event()

    def forget_log(self) -> None:
        """Every watcher that has not seen the newest change must list anew (410)."""
        self._version += 1
        self._forgotten = self._version
        self._log.clear()
        self.wake()

    async def changes(self, since: int) -> AsyncIterator[Change]:
        """Each change after that version, without end. Raises Expired where some of them are forgotten."""
        while True:
            if since < self._forgotten:
                raise Expired
            news = self._news
            for change in self._after(since):
                if change.key.plural in self.held_back:
                    break
                yield change
                since = change.version
            if news is self._news:
                await news.wait()

    def _after(self, since: int) -> list[Change]:
        return [change for change in self._log if change.version > since]


def _desired(document: Object) -> Object:
    """What a generation counts: all but metadata and status."""
    return {key: value for key, value in document.items() if key not in ("metadata", "status")}


def _without_owners(document: Object) -> Object:
    metadata = {key: value for key, value in document["metadata"].items() if key != "managedFields"}
    return document | {"metadata": metadata}


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
