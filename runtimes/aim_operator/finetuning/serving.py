"""What a job published, kept as a ConfigMap beside it, and as an InferenceService where the job asks for one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aim_profile.kubernetes.kserve import Service, inference_service
from aim_profile.kubernetes.target import RenderError, Target
from aim_profile.serving.files import read

FILE, URI = "serving-profile.yaml", "uri"
#: One of manifests/, which asks for no device of its own.
_RUNTIME = "aim-vllm"


def config_map_name(job: str) -> str:
    """Of the profile."""
    return f"{job}-profile"


def config_map(job: Mapping[str, Any], uri: str, profile: str) -> dict[str, Any]:
    """profile: the text of serving-profile.yaml."""
    metadata = job["metadata"]
    owner = {"apiVersion": job["apiVersion"], "kind": job["kind"], "name": metadata["name"], "uid": metadata["uid"]}
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": config_map_name(metadata["name"]),
            "namespace": metadata["namespace"],
            "ownerReferences": [owner],
        },
        "data": {FILE: profile, URI: uri},
    }


def service(name: str, uri: str, kept: Mapping[str, Any] | None, job: Mapping[str, Any]) -> dict[str, Any]:
    """The InferenceService of what is published at `uri`, by the profile that was kept.

    Raises AimProfileError: no profile, an adapter, a place KServe does not fetch from, or a model that fits nowhere.
    """
    text = ((kept or {}).get("data") or {}).get(FILE)
    if text is None:
        raise _not_served("output.profile", "none", "the job published no serving profile; set it to auto-generate")
    spec = job["spec"]
    form = (spec.get("output") or {}).get("format") or ("merged" if spec.get("method") == "full" else "adapter")
    if form == "adapter":
        remedy = "an adapter is served beside its base (docs/adapters.md); set output.format to merged for a service"
        raise _not_served("output.format", form, remedy)
    if "://" not in uri or uri.startswith("file://"):
        raise _not_served("output.registry", uri, "KServe fetches from s3://, hf:// and oci://, not from a path")
    profile = read(text, FILE)
    target = Target(namespace=job["metadata"]["namespace"], runtime=_RUNTIME)
    return inference_service(Service(name=name, profile=profile, storage_uri=uri), target)


def _not_served(field: str, value: str, remedy: str) -> RenderError:
    return RenderError(f"{field}: {value}: no InferenceService is made of it", field=field, value=value, remedy=remedy)
