"""The Helm charts: by the shipped values the same objects as Kustomize's, by any other values what the code says."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from aim_guardrail.policy.policy import parse_policy
from aim_profile.kubernetes.charts import shipped_values
from aim_profile.kubernetes.tenant import Tenant, tenant
from crd_schemas import CRDS, violations
from helm_render import Rendered, findings, rendered
from kserve_webhook import denied
from manifest_files import MANIFESTS, Object, built, name_of, of_kind

RUNTIMES, TENANT = MANIFESTS / "charts/aim-runtimes", MANIFESTS / "charts/aim-tenant"
OVERLAYS = [*shipped_values()]
TENANTS: dict[str, dict[str, Any]] = {
    "as shipped": {},
    "no queue, with keys": {"clusterQueue": "", "apiKeys": "version: 1\nkeys: []\n"},
    "others": {
        "namespace": "chat",
        "group": "oidc:chat team: 'a'",
        "podSecurity": "baseline",
        "gatewayNamespace": "istio-ingress",
        "sources": [{"namespaceSelector": {}}, {"ipBlock": {"cidr": "192.0.2.0/24"}}],
        "policy": 'version: 2\nname: "mine: {{ not Helm\'s }}"\nprompt: []\n',
    },
}
REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (TENANT, {"podSecurity": "none"}, "'/podSecurity'"),
    (TENANT, {"namespace": "Team_A"}, "'/namespace'"),
    (TENANT, {"quotas": {}}, "'quotas' not allowed"),
    (RUNTIMES, {"runtimes": ["aim-vllm-cpx-nps8"]}, "'/runtimes/0'"),
    (RUNTIMES, {"product": "MI210"}, "'/product'"),
    (
        RUNTIMES,
        {"images": {"aim-runtime": {"name": "aim-runtime", "digest": "sha256:1"}}},
        "'/images/aim-runtime/digest'",
    ),
]
MINE = {
    "images": {"aim-runtime": {"name": "registry.example.com/aim-runtime", "digest": f"sha256:{'0' * 64}"}},
    "runtimes": ["aim-vllm", "aim-llamacpp"],
}


@pytest.fixture(scope="module")
def answers() -> dict[str, Rendered]:
    """All that these tests ask of Helm, by name."""
    files = {name: RUNTIMES / f"values-{name}.yaml" for name in OVERLAYS}
    asked = {name: (RUNTIMES, yaml.safe_load(file.read_text("utf-8"))) for name, file in files.items()}
    asked |= {name: (TENANT, values) for name, values in TENANTS.items()}
    asked |= {says: (chart, values) for chart, values, says in REFUSED}
    asked["mine"] = (RUNTIMES, MINE)
    return dict(zip(asked, rendered([*asked.values()]), strict=True))


def by_name(objects: list[Object]) -> dict[tuple[str, str], Object]:
    found = {(each["kind"], name_of(each)): each for each in objects}
    assert len(found) == len(objects)
    return found


def test_each_overlay_has_its_values() -> None:
    assert set(OVERLAYS) == {path.name for path in (MANIFESTS / "overlays").iterdir()}


@pytest.mark.parametrize("name", OVERLAYS)
def test_helm_installs_what_the_overlay_does(name: str, answers: dict[str, Rendered]) -> None:
    assert by_name(answers[name].objects) == by_name(built(MANIFESTS / "overlays" / name))


@pytest.mark.parametrize("name", TENANTS)
def test_a_tenant_is_what_the_code_says(name: str, answers: dict[str, Rendered]) -> None:
    found = answers[name].objects
    assert by_name(found) == by_name(tenant(Tenant(**TENANTS[name])))
    assert len(found) == 15


def test_kustomizes_tenant_is_the_charts(answers: dict[str, Rendered]) -> None:
    assert by_name(answers["as shipped"].objects) == by_name(built(MANIFESTS / "tenant"))


def test_every_object_of_both_charts_is_one_that_a_cluster_takes(answers: dict[str, Rendered]) -> None:
    found = [each for answer in answers.values() for each in answer.objects]
    assert len(found) == 76
    assert [line for each in found for line in denied(each)] == []
    if CRDS:
        assert [f"{name_of(each)}: {line}" for each in found for line in violations(each)] == []


@pytest.mark.parametrize("says", [says for _, _, says in REFUSED])
def test_values_that_the_schema_does_not_know_are_refused(says: str, answers: dict[str, Rendered]) -> None:
    assert says in answers[says].refused
    assert answers[says].objects == []


def test_images_are_where_the_values_say(answers: dict[str, Rendered]) -> None:
    found = {name_of(each): each["spec"]["containers"][0]["image"] for each in answers["mine"].objects}
    assert found["aim-vllm"] == f"registry.example.com/aim-runtime@sha256:{'0' * 64}"
    assert found["aim-llamacpp"].startswith("aim-runtime-cpu:")


@pytest.mark.parametrize("chart", [RUNTIMES, TENANT], ids=lambda chart: chart.name)
def test_helm_has_nothing_to_say_against_a_chart(chart: Any) -> None:
    assert findings(chart) == []


# --- what a tenant is ---------------------------------------------------------------------------------------------


def policies() -> dict[str, Object]:
    return {name_of(each): each["spec"] for each in of_kind("NetworkPolicy", "tenant")}


def test_nobody_speaks_to_anybody_unless_it_is_listed() -> None:
    assert policies()["default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for name, spec in policies().items():
        rules = [rule for kind in ("ingress", "egress") for rule in spec.get(kind, [])]
        assert (name == "default-deny") == (rules == [])
        # A rule without a peer is for everybody.
        assert all(rule.get("from") or rule.get("to") for rule in rules)


def test_clients_reach_the_pods_that_answer_them_alone() -> None:
    entry = policies()["clients-through-the-gateway"]["podSelector"]["matchLabels"]
    for service in of_kind("InferenceService", "samples"):
        parts = {name: entry.items() <= part.get("labels", {}).items() for name, part in service["spec"].items()}
        assert parts == ({"predictor": False, "transformer": True} if "transformer" in parts else {"predictor": True})


def test_members_read_no_secrets_and_widen_nothing() -> None:
    (role,) = of_kind("Role", "tenant")
    allowed = [(resource, verb) for rule in role["rules"] for resource in rule["resources"] for verb in rule["verbs"]]
    forbidden = {"secrets", "pods/exec", "pods/attach", "pods/portforward", "serviceaccounts/token"}
    assert not forbidden & {resource for resource, _ in allowed}
    assert "*" not in {word for pair in allowed for word in pair} | {
        group for rule in role["rules"] for group in rule["apiGroups"]
    }
    fixed = {"resourcequotas", "limitranges", "networkpolicies", "roles", "rolebindings", "localqueues", "pods"}
    assert not [pair for pair in allowed if pair[0] in fixed and pair[1] not in ("get", "list", "watch")]


def test_the_tenants_policy_is_one() -> None:
    (config,) = of_kind("ConfigMap", "tenant")
    assert parse_policy(config["data"]["policy.yaml"], "policy.yaml").name == "ours"
