"""The samples of manifests/: what a user copies, each a Kustomize folder for a namespace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from aim_profile.gpus.catalog import by_name
from aim_profile.models.known import by_id
from aim_profile.serving.derive import Refusal, Wanted, derive
from aim_profile.serving.profile import FineTuning

from . import guardrail, routing
from .guardrail import GUARDRAIL_IMAGE, STANDALONE, only_from_the_guardrail
from .isolation import COMPONENT, ENTRY, SERVICE
from .kserve import Document, Service, inference_service, service_name
from .kustomize import folder_of
from .runtimes import CPU_RESOURCES, variant
from .target import RenderError, Target
from .tenant import Tenant, tenant

_MODEL, _GPU, _MODE = "Qwen/Qwen3-8B", "MI300X", "CPX/NPS4"
_CPU_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
_FOUR = ("Qwen/Qwen2.5-3B-Instruct", "meta-llama/Llama-3.1-8B-Instruct", "google/gemma-3-4b-it", "Qwen/Qwen3-4B")
_ONE_CPU = "One model without a GPU: needs overlays/dev-cpu."
_ONE = (
    f"One model on one {_MODE} partition of an {_GPU}: needs overlays/mi300x-cpx.\n"
    "A changed storageUri or image stops the old pod before the new one starts (maxSurge 0), since the new one may\n"
    "need the very partition that the old one holds: with one replica nobody answers while the new one loads."
)
_GUARDED = (
    f"{_ONE}\nThe guardrail is KServe's transformer before it: aim.amd.com/guardrail-policy names its policy.\n"
    "KServe gives it --model_name, --predictor_host and --http_port."
)
_NO_WAY_ROUND = (
    "Nobody but the guardrail reaches the model. Let your Prometheus in by a second rule if it scrapes the predictor."
)
_SIDECAR = (
    f"{_ONE}\nThe guardrail is in the model's own pod and has its ports; the runtime listens behind it. One hop over\n"
    "the loopback and one pod to scale, but a change of either restarts both."
)
_SCALED = (
    f"{_ONE}\nKServe makes a ScaledObject of autoScaling: KEDA has to be there, and the Prometheus that is named. A\n"
    "replica for every 4 requests that wait; each needs a partition of its own that is free. Utilisation says nothing\n"
    "here: the device metrics of AMD's exporter are those of partition 0."
)
_KEDAS_SIGHT = "While partitions are switched one replica at a time may be moved."
_FOUR_SAY = (
    f"Four models on four of the eight {_MODE} partitions of an {_GPU}: needs overlays/mi300x-cpx. Each has memory\n"
    "and compute units of its own; the card's power and links are shared. On nodes of several cards it is the device\n"
    "plugin that chooses; samples that must be on one card claim siblings (claims/)."
)
_ADAPTER = (
    "A LoRA adapter on a base model, and its next version beside it on a partition of its own: the route below gives\n"
    "that a tenth of the requests. Clients ask for the model `support` of either."
)
_CANARY = "Shift the weights, then drop the old service. KServe's own canaryTrafficPercent needs Knative."
_TUNED = (
    "What the job of manifests/training published, on its base model: version 1, from the volume it was written to.\n"
    "The next version is a change of the URI. Clients ask for the model `support`."
)


def samples() -> dict[str, str]:
    """Every sample's files: path below manifests/ → text."""
    images = [GUARDRAIL_IMAGE]
    return {
        **_one("one-model-cpu", [(_ONE_CPU, _cpu_service())]),
        **_one("one-model", [(_ONE, _service()), (_KEDAS_SIGHT, _budget(service_name(_MODEL)))]),
        **_one("guarded-model", _guarded(), images),
        **_one("guarded-sidecar", _sidecar(), images),
        **_one("guardrail", _standalone(), images),
        **_one("scaled", _scaled()),
        **_one("gateway", _gateway()),
        **_one("four-models", _four()),
        **_one("adapters-canary", _adapters()),
        **_one("tuned-model", [(_TUNED, _tuned())]),
        **_one("secrets", routing.external_secrets()),
    }


def tenants() -> dict[str, str]:
    """A tenant's namespace by Kustomize: what the chart aim-tenant is by its own values."""
    return folder_of("tenant", {"tenant": [("", each) for each in tenant(Tenant())]})


def _one(name: str, documents: Sequence[Document], images: Sequence[str] = ()) -> dict[str, str]:
    return folder_of(f"samples/{name}", {name: documents}, images)


def _cpu_service() -> dict[str, Any]:
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {
            "name": service_name(_CPU_MODEL),
            "annotations": {"serving.kserve.io/deploymentMode": "Standard"},
        },
        "spec": {
            "predictor": {
                "automountServiceAccountToken": False,
                "labels": dict(ENTRY),
                "terminationGracePeriodSeconds": 60,
                "model": {
                    "modelFormat": {"name": "safetensors", "version": "1"},
                    "storageUri": f"hf://{_CPU_MODEL}",
                    "args": ["--max_model_len=2048"],
                    "resources": CPU_RESOURCES,
                },
            }
        },
    }


def _service(
    suffix: str = "", model: str = _MODEL, wanted: Wanted | None = None, name: str | None = None
) -> dict[str, Any]:
    mode = by_name(_GPU).mode(_MODE)
    profile = derive(by_id(model), mode, wanted or Wanted())
    if isinstance(profile, Refusal):
        raise RenderError(
            f"the samples' model: {profile.reason}", field="model", value=model, remedy="choose one that fits"
        )
    target = Target(runtime=variant(mode.resource_label))
    return inference_service(Service((name or service_name(model)) + suffix, profile), target)


def _budget(service: str, component: str = "predictor") -> dict[str, Any]:
    return guardrail.disruption_budget(f"{service}-{component}", {SERVICE: service, COMPONENT: component})


def _guarded() -> list[Document]:
    service = _service("-guarded")
    guardrail.as_transformer(service, "chat")
    return [(_GUARDED, service), (_NO_WAY_ROUND, only_from_the_guardrail(service["metadata"]["name"]))]


def _sidecar() -> list[Document]:
    service = _service("-sidecar")
    guardrail.as_sidecar(service, "chat")
    return [(_SIDECAR, service)]


def _standalone() -> list[Document]:
    says = {
        "ConfigMap": "Yours to change (`aim-guardrail policy validate` says what is wrong); it is read while it runs.",
        "Deployment": f"The guardrail alone, asked by others: https://{STANDALONE}/filter.",
    }
    made = [*guardrail.standalone(guardrail.POLICY), *routing.certificate(STANDALONE)]
    return [(says.get(each["kind"], ""), each) for each in made]


def _scaled() -> list[Document]:
    service = _service("-scaled")
    name = service["metadata"]["name"]
    service["metadata"]["annotations"]["serving.kserve.io/autoscalerClass"] = "keda"
    service["spec"]["predictor"] |= {
        "maxReplicas": 4,
        "autoScaling": {
            "metrics": [
                {
                    "type": "External",
                    "external": {
                        "metric": {
                            "backend": "prometheus",
                            "serverAddress": "http://prometheus-operated.monitoring.svc:9090",
                            "query": f'sum(aim_requests_waiting{{model_name="{name}"}})',
                        },
                        "target": {"type": "Value", "value": "4"},
                    },
                }
            ],
            # A model loads for minutes: what was started stays a while.
            "behavior": {"scaleDown": {"stabilizationWindowSeconds": 600}},
        },
    }
    return [(_SCALED, service), ("", _budget(name))]


def _gateway() -> list[Document]:
    return routing.gateway(service_name(_MODEL), f"{service_name(_MODEL)}-guarded")


def _four() -> list[Document]:
    return [(_FOUR_SAY if at == 0 else "", _service(model=model)) for at, model in enumerate(_FOUR)]


def _adapters() -> list[Document]:
    return [
        (_ADAPTER, _with_adapter("support", "s3://models/adapters/support/v1")),
        ("", _with_adapter("support-next", "s3://models/adapters/support/v2")),
        (_CANARY, routing.weighted("support", {"support": 90, "support-next": 10})),
    ]


def _tuned() -> dict[str, Any]:
    return _with_adapter("support-tuned", "pvc://training/registry/support/v1")


def _with_adapter(name: str, adapter: str) -> dict[str, Any]:
    service = _service(name=name, wanted=Wanted(finetuning=FineTuning(lora_slots=1, lora_rank=16)))
    predictor = service["spec"]["predictor"]
    model = predictor["model"]
    predictor["storageUris"] = [
        {"uri": model.pop("storageUri"), "mountPath": "/mnt/models"},
        {"uri": adapter, "mountPath": "/mnt/adapters/support"},
    ]
    model["args"] = ["--adapters=support=/mnt/adapters/support", *model["args"]]
    return service
