"""manifests/monitoring: every file's text."""

from __future__ import annotations

from typing import Any

from aim_profile.files.write import dump
from aim_profile.kubernetes.serving_runtime import NAME_LABEL, release

from . import alerts, recordings
from .board import as_json
from .dashboards import BOARDS
from .monitors import (
    AUTHORIZATION,
    EXPORTER_IMAGE,
    exporter,
    exporter_monitor,
    operator_monitor,
    serving_monitor,
    trainer_monitor,
)
from .rule import Group, rule_file


def groups() -> tuple[Group, ...]:
    """All rules."""
    return (
        recordings.latencies(),
        recordings.costs(),
        recordings.tenants(),
        alerts.SERVING,
        alerts.GUARDRAIL,
        alerts.TRAINING,
        alerts.FLEET,
        alerts.OPERATOR,
    )


def files(mark: str) -> dict[str, str]:
    """Path below the folder → text. mark: what every file begins with."""
    objects = {
        "rules": _prometheus_rule(),
        "serving": serving_monitor(),
        "trainer": trainer_monitor(),
        "operator-monitor": operator_monitor(),
        "exporter-monitor": exporter_monitor(),
        "exporter": exporter(),
    }
    base = {f"{name}.yaml": each for name, each in objects.items()}
    documents = {
        **{f"base/{name}": each for name, each in base.items()},
        "base/kustomization.yaml": _kustomization(
            resources=[*base, "../dashboards"], images=[{"name": EXPORTER_IMAGE, "newTag": release()}]
        ),
        "dashboards/kustomization.yaml": _kustomization(configMapGenerator=[_dashboards()]),
        "with-token/kustomization.yaml": _kustomization(resources=["../base"], patches=[_token()]),
        # The same rules for a Prometheus without its operator.
        "aim.rules": rule_file(groups()),
    }
    written = {name: f"# {mark}\n{dump(each)}" for name, each in documents.items()}
    return written | {f"dashboards/{board.uid}.json": as_json(board, mark) for board in BOARDS}


def _prometheus_rule() -> dict[str, Any]:
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "aim", "labels": {NAME_LABEL: "aim"}},
        "spec": rule_file(groups()),
    }


def _kustomization(**body: Any) -> dict[str, Any]:
    return {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", **body}


def _dashboards() -> dict[str, Any]:
    return {
        "name": "aim-dashboards",
        "files": [f"{board.uid}.json" for board in BOARDS],
        # Grafana's sidecar takes dashboards out of ConfigMaps with this label.
        "options": {"labels": {"grafana_dashboard": "1"}, "disableNameSuffixHash": True},
    }


def _token() -> dict[str, Any]:
    added = {"op": "add", "path": "/spec/podMetricsEndpoints/0/authorization", "value": dict(AUTHORIZATION)}
    return {"target": {"kind": "PodMonitor", "name": "^aim-serving$"}, "patch": dump([added])}
