"""The double does what operators lean on, as a real API server does it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from aim_operator.cluster import Cluster as Api
from aim_operator.cluster import Resource
from kube_double.cluster import Cluster, KubectlFailed

CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
JUGS = "/apis/test.example/v1/namespaces/default/jugs"
MAPS = "/api/v1/namespaces/default/configmaps"
ANYTHING = {"x-kubernetes-preserve-unknown-fields": True}
LIST = {"type": "array", "items": ANYTHING}
SPEC = {
    "type": "object",
    "required": ["litres"],
    "properties": {
        "litres": {"type": "integer", "minimum": 1},
        "colour": {"type": "string", "default": "blue"},
        "maker": {
            "type": "string",
            "x-kubernetes-validations": [{"rule": "self == oldSelf", "message": "maker never changes"}],
        },
        "lids": {
            "type": "array",
            "items": {"type": "object", "properties": {"of": {"x-kubernetes-int-or-string": True}}},
        },
    },
    "x-kubernetes-validations": [{"rule": "self.litres < 100", "message": "too much"}],
}


def crd(spec: dict[str, Any]) -> dict[str, Any]:
    version = {
        "name": "v1",
        "served": True,
        "storage": True,
        "subresources": {"status": {}},
        "additionalPrinterColumns": [
            {"name": "Litres", "type": "integer", "jsonPath": ".spec.litres"},
            {"name": "Ready", "type": "string", "jsonPath": '.status.conditions[?(@.type=="Ready")].status'},
        ],
        "schema": {
            "openAPIV3Schema": {
                "type": "object",
                "required": ["spec"],
                "properties": {
                    "spec": spec,
                    "status": {
                        "type": "object",
                        "properties": {
                            "conditions": {
                                "type": "array",
                                "items": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
                            }
                        },
                    },
                },
            }
        },
    }
    names = {"plural": "jugs", "singular": "jug", "kind": "Jug"}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": "jugs.test.example"},
        "spec": {"group": "test.example", "scope": "Namespaced", "names": names, "versions": [version]},
    }


def jug(name: str = "one", **spec: Any) -> dict[str, Any]:
    return {"apiVersion": "test.example/v1", "kind": "Jug", "metadata": {"name": name}, "spec": {"litres": 3, **spec}}


def refused(call: httpx.HTTPStatusError) -> tuple[int, str]:
    return call.response.status_code, call.response.json()["message"]


@pytest.fixture
def jugs(kubernetes: Cluster) -> Cluster:
    kubernetes.define(crd(SPEC))
    return kubernetes


@pytest.mark.cluster
def test_defaults_are_filled_in_and_unknown_fields_dropped(jugs: Cluster) -> None:
    found = jugs.create(JUGS, jug(unknown=1, lids=[{"of": "tin", "more": 1}]))
    assert found["spec"] == {"litres": 3, "colour": "blue", "lids": [{"of": "tin"}]}
    assert found["metadata"]["generation"] == 1


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("spec", "told"), [({"litres": 0}, "spec.litres"), ({"litres": 100}, "too much"), ({"litres": "3"}, "spec.litres")]
)
def test_schema_and_rules_are_enforced(jugs: Cluster, spec: dict[str, Any], told: str) -> None:
    with pytest.raises(httpx.HTTPStatusError) as caught:
        jugs.create(JUGS, jug(**spec))
    code, message = refused(caught.value)
    assert code == 422
    assert told in message
    assert not jugs.exists(f"{JUGS}/one")


@pytest.mark.cluster
def test_a_rule_sees_what_was(jugs: Cluster) -> None:
    jugs.create(JUGS, jug(maker="a"))
    with pytest.raises(httpx.HTTPStatusError) as caught:
        jugs.patch(f"{JUGS}/one", {"spec": {"maker": "b"}})
    assert refused(caught.value)[0] == 422
    assert "maker never changes" in refused(caught.value)[1]


@pytest.mark.cluster
@pytest.mark.parametrize(
    "spec",
    [
        {"type": "object", "properties": {"a": {}}},
        {"type": "object", "properties": {"a": {"type": "array"}}},
        {"type": "object", "additionalProperties": False, "properties": {"a": {"type": "string"}}},
        {"type": "object", "anyOf": [{"type": "object"}]},
        {"type": "object", "properties": {"a": {"$ref": "#/definitions/a", "type": "string"}}},
        {"type": "object", "properties": {"a": ANYTHING}, "x-kubernetes-validations": [{"rule": "has(self.a)"}]},
        {"type": "object", "properties": {"a": LIST}, "x-kubernetes-validations": [{"rule": "has(self.a)"}]},
        {"type": "object", "properties": {}, "x-kubernetes-validations": [{"rule": "self.b > 1"}]},
    ],
)
def test_schemas_that_are_not_structural_are_refused(kubernetes: Cluster, spec: dict[str, Any]) -> None:
    with pytest.raises(httpx.HTTPStatusError) as caught:
        kubernetes.create(CRDS, crd(spec))
    assert refused(caught.value)[0] == 422
    assert "spec" in refused(caught.value)[1]


@pytest.mark.cluster
def test_status_and_spec_have_a_door_each(jugs: Cluster) -> None:
    jugs.create(JUGS, jug() | {"status": {"conditions": [{"type": "Ready"}]}})
    assert "status" not in jugs.read(f"{JUGS}/one")
    done = jugs.patch(f"{JUGS}/one/status", {"spec": {"litres": 9}, "status": {"conditions": [{"type": "Ready"}]}})
    assert (done["spec"]["litres"], len(done["status"]["conditions"])) == (3, 1)
    assert done["metadata"]["generation"] == 1
    changed = jugs.patch(f"{JUGS}/one", {"spec": {"litres": 9}, "status": None})
    assert (changed["spec"]["litres"], len(changed["status"]["conditions"])) == (9, 1)
    assert changed["metadata"]["generation"] == 2


@pytest.mark.cluster
def test_of_five_writers_of_one_version_one_wins(kubernetes: Cluster) -> None:
    stored = kubernetes.create(MAPS, {"metadata": {"name": "m"}, "data": {"a": "0"}})

    def write(number: int) -> int:
        body = stored | {"data": {"a": f"{number} wrote"}}
        return httpx.put(f"{kubernetes.url}{MAPS}/m", json=body).status_code

    with ThreadPoolExecutor(5) as writers:
        assert sorted(writers.map(write, range(5))) == [200, 409, 409, 409, 409]


@pytest.mark.cluster
def test_a_finalizer_holds_an_object_until_it_is_gone(kubernetes: Cluster) -> None:
    kubernetes.create(MAPS, {"metadata": {"name": "m", "finalizers": ["test.example/hold"]}})
    assert "deletionTimestamp" in kubernetes.delete(f"{MAPS}/m")["metadata"]
    assert kubernetes.exists(f"{MAPS}/m")
    kubernetes.patch(f"{MAPS}/m", {"metadata": {"finalizers": None}})
    kubernetes.wait_gone(MAPS, "m")


@pytest.mark.cluster
async def test_a_kind_that_nobody_defined_has_no_objects(kubernetes: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server says so without a Status, which the operator's client takes for an error of another kind."""
    monkeypatch.setenv("KUBECONFIG", str(kubernetes.kubeconfig))
    assert not kubernetes.exists(f"{JUGS}/one")
    unknown = Resource("test.example/v1", "Jug", "jugs")
    async with Api() as api:
        assert await api.list(unknown) == []
        assert await api.get(unknown, "one", "default") is None
        await api.delete(unknown, "one", "default")


def test_what_is_owned_goes_with_its_owner(kubernetes: Cluster) -> None:
    owner = kubernetes.create(MAPS, {"metadata": {"name": "owner"}})
    reference = {"apiVersion": "v1", "kind": "ConfigMap", "name": "owner", "uid": owner["metadata"]["uid"]}
    kubernetes.create(MAPS, {"metadata": {"name": "owned", "ownerReferences": [reference]}})
    kubernetes.delete(f"{MAPS}/owner")
    kubernetes.wait_gone(MAPS, "owned")


@pytest.mark.cluster
def test_kubectl_applies_on_the_server_shows_columns_and_names_conflicts(jugs: Cluster) -> None:
    manifest = "apiVersion: test.example/v1\nkind: Jug\nmetadata: {name: one, labels: {a: b}}\nspec: {litres: 3}\n"
    jugs.kubectl("apply", "--server-side", "-f", "-", stdin=manifest)
    jugs.kubectl("apply", "--server-side", "-f", "-", stdin=manifest.replace("labels: {a: b}", "labels: {c: d}"))
    assert jugs.read(f"{JUGS}/one")["metadata"]["labels"] == {"c": "d"}
    jugs.patch(f"{JUGS}/one/status", {"status": {"conditions": [{"type": "Ready", "status": "True"}]}})
    assert jugs.kubectl("get", "jugs").split() == ["NAME", "LITRES", "READY", "one", "3", "True"]
    jugs.kubectl("patch", "jug", "one", "--type=merge", "-p", '{"spec":{"litres":4}}')
    with pytest.raises(KubectlFailed, match=r"(?s)conflict.*spec.litres"):
        jugs.kubectl("apply", "--server-side", "-f", "-", stdin=manifest)
    jugs.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=manifest)
    assert jugs.read(f"{JUGS}/one")["spec"]["litres"] == 3


@pytest.mark.cluster
def test_a_watch_with_a_selector_sees_objects_come_and_go(kubernetes: Cluster) -> None:
    seen: list[tuple[str, str]] = []
    since = kubernetes.read(MAPS)["metadata"]["resourceVersion"]

    def watch() -> None:
        query = {"watch": "1", "resourceVersion": since, "labelSelector": "a in (b,c)", "timeoutSeconds": "30"}
        with httpx.stream("GET", f"{kubernetes.url}{MAPS}", params=query, timeout=30) as response:
            for line in response.iter_lines():
                told = httpx.Response(200, text=line).json()
                seen.append((told["type"], told["object"]["metadata"]["name"]))
                if len(seen) == 3:
                    return

    watcher = threading.Thread(target=watch)
    watcher.start()
    kubernetes.create(MAPS, {"metadata": {"name": "other"}})
    kubernetes.create(MAPS, {"metadata": {"name": "m", "labels": {"a": "b"}}})
    kubernetes.patch(f"{MAPS}/m", {"metadata": {"labels": {"a": "c"}}})
    kubernetes.patch(f"{MAPS}/m", {"metadata": {"labels": {"a": None}}})
    watcher.join(30)
    assert seen == [("ADDED", "m"), ("MODIFIED", "m"), ("DELETED", "m")]


def test_a_watch_older_than_what_is_remembered_is_told_410(kubernetes: Cluster) -> None:
    kubernetes.expire_watches()
    query = {"watch": "1", "resourceVersion": "1"}
    with httpx.stream("GET", f"{kubernetes.url}{MAPS}", params=query, timeout=30) as response:
        told = httpx.Response(200, text=next(response.iter_lines())).json()
    assert (told["type"], told["object"]["code"]) == ("ERROR", 410)


def test_faults_come_about_as_often_as_asked(kubernetes: Cluster) -> None:
    kubernetes.create(MAPS, {"metadata": {"name": "m"}})
    faults = kubernetes.double.faults
    faults.conflicts("configmaps", 2)
    for _ in range(2):
        with pytest.raises(httpx.HTTPStatusError, match="409"):
            kubernetes.patch(f"{MAPS}/m", {"data": {"a": "b"}})
    kubernetes.patch(f"{MAPS}/m", {"data": {"a": "b"}})
    faults.refuses("configmaps", "DELETE", 1, 503)
    with pytest.raises(httpx.HTTPStatusError, match="503"):
        kubernetes.delete(f"{MAPS}/m")
    seen: list[str] = []
    faults.after_write("configmaps", "PATCH", lambda: seen.append(kubernetes.read(f"{MAPS}/m")["data"]["a"]))
    kubernetes.patch(f"{MAPS}/m", {"data": {"a": "c"}})
    assert seen == ["c"]
    assert faults.pending == 0
