"""Which files there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from aim_operator.partitions.crd import custom_resource_definition as partition_plan
from aim_operator.policies.crd import custom_resource_definition as guardrail_policy
from aim_profile.files.write import dump, dump_all
from aim_profile.kubernetes.generated import MARK, Generated
from aim_profile.kubernetes.serving_runtime import release
from aim_trainer.job.schema import custom_resource_definition as fine_tuning_job

from .access import access
from .admission import admission
from .deployment import IMAGE, NAMESPACE, deployment

Object = dict[str, Any]


def folders() -> Mapping[str, Generated]:
    """Folder below manifests/ → its files."""
    definitions = {
        each["metadata"]["name"].partition(".")[0]: [each]
        for each in (guardrail_policy(), partition_plan(), fine_tuning_job())
    }
    own = {"access": access(), "admission": admission(), "deployment": deployment()}
    images = [{"name": IMAGE, "newTag": release()}]
    return {
        "crds": _folder(definitions, {}),
        "operator": _folder(own, {"namespace": NAMESPACE, "images": images}, ["../crds"]),
    }


def _folder(files: Mapping[str, Sequence[Object]], more: Object, besides: Sequence[str] = ()) -> Generated:
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [*besides, *(f"{name}.yaml" for name in sorted(files))],
        **more,
    }
    made = {f"{name}.yaml": _marked(dump_all([("", each) for each in objects])) for name, objects in files.items()}
    return Generated({"kustomization.yaml": _marked(dump(kustomization)), **made})


def _marked(text: str) -> str:
    return f"# {MARK}\n{text}"
