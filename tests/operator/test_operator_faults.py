"""The real operator killed between a write and its event, started again, refused, cut off, and succeeded by another."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from aim_operator.__main__ import app
from aim_operator.policies.crd import custom_resource_definition
from kube_double.cluster import Cluster
from operator_process import operator

POLICIES = "/apis/aim.amd.com/v1alpha1/namespaces/default/guardrailpolicies"
MAPS = "/api/v1/namespaces/default/configmaps"
LEASES = "/apis/coordination.k8s.io/v1/namespaces/aim-system/leases"


def policy(name: str) -> dict[str, Any]:
    body = {"apiVersion": "aim.amd.com/v1alpha1", "kind": "GuardrailPolicy", "metadata": {"name": name}}
    return body | {"spec": {"prompt": [{"type": "pii", "action": "block"}]}}


def is_valid(found: dict[str, Any]) -> bool:
    return any(each["status"] == "True" for each in found.get("status", {}).get("conditions", ()))


def writes(kubernetes: Cluster) -> list[str]:
    """What changed anything but leases."""
    return [each for each in kubernetes.double.requests if not each.startswith("GET ") and "/leases" not in each]


def test_killed_at_a_write_its_successor_ends_the_work_and_writes_nothing_twice(
    kubernetes: Cluster, tmp_path: Path
) -> None:
    kubernetes.define(custom_resource_definition())
    killed = threading.Event()
    with operator(kubernetes, tmp_path, "--policy-poll", "0.2", name="first", webhooks=False) as first:
        kubernetes.double.faults.after_write("configmaps", "POST", lambda: (first.kill(), killed.set()))
        kubernetes.create(POLICIES, policy("mine"))
        assert killed.wait(60)
    assert kubernetes.exists(f"{MAPS}/mine-guardrail-policy")
    assert "status" not in kubernetes.read(f"{POLICIES}/mine")
    with operator(kubernetes, tmp_path, "--policy-poll", "0.2", name="second", webhooks=False) as second:
        # It waits until the first one's lease has run out, and leads.
        found = kubernetes.wait_for(POLICIES, "mine", is_valid)
        assert writes(kubernetes).count(f"POST {MAPS}") == 1
        done = len(writes(kubernetes))
        # 409 to each write, then watches that are too old: it looks again.
        kubernetes.double.faults.conflicts("guardrailpolicies", 3)
        kubernetes.create(POLICIES, policy("stormy"))
        kubernetes.wait_for(POLICIES, "stormy", is_valid)
        kubernetes.expire_watches()
        kubernetes.create(POLICIES, policy("after"))
        kubernetes.wait_for(POLICIES, "after", is_valid)
        kubernetes.close_watches()
        kubernetes.patch(f"{POLICIES}/after", {"spec": {"prompt": [{"type": "pii", "action": "flag"}]}})
        kubernetes.wait_for(POLICIES, "after", lambda it: it["status"].get("observedGeneration") == 2)
        assert not [each for each in writes(kubernetes)[done:] if "mine" in each]
        assert kubernetes.read(f"{POLICIES}/mine") == found
        told = [json.loads(line) for line in second.audit.read_text(encoding="utf-8").splitlines()]
        assert {(line["audit"], line["name"], line["outcome"]) for line in told} == {
            ("apply_policy", "default/stormy", "ok"),
            ("apply_policy", "default/after", "ok"),
        }
        assert "aim_operator_leads 1.0" in second.get("/metrics").text
        assert second.stop() == 0
    assert kubernetes.read(f"{LEASES}/aim-operator")["spec"]["holderIdentity"] == ""


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--certificates", "nowhere"], "error: --certificates nowhere: nowhere/tls.crt is missing"),
        (["--retry-period", "60"], "error: --renew-deadline 10: must lie between"),
        (["--audit-log", "/nowhere/audit"], "error: --audit-log /nowhere/audit: cannot be written"),
    ],
)
def test_what_it_cannot_start_with_is_one_line(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:

    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1
    assert told in str(done.exception)
