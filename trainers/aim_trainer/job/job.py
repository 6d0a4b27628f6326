"""FineTuningJob: the object of `kubectl apply` and of `aim-trainer run`. Its JSON Schema is the CRD's.

apiVersion: aim.amd.com/v1alpha1
kind: FineTuningJob
metadata: {name: support-bot}
spec:
  baseModel: {modelId: meta-llama/Llama-3.1-8B-Instruct}
  method: lora
  dataset: {source: s3://bucket/chats.jsonl}
  output: {registry: s3://bucket/models/support-bot}
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from aim_profile.files.place import MisplacedError

from .contradictions import contradictions
from .dataset import Dataset
from .fields import (
    DataUri,
    Flag,
    Image,
    JobName,
    LabelValue,
    MetadataKey,
    ModelUri,
    Namespace,
    Part,
    Quantity,
    ResourceName,
    ResultUri,
    StoreUri,
    Text,
    Whole,
)
from .hyperparameters import Hyperparameters
from .judged import Search, Validation, Watched

API_VERSION: Literal["aim.amd.com/v1alpha1"] = "aim.amd.com/v1alpha1"
Method = Literal["lora", "qlora", "full"]
Template = Literal["chat", "code", "summarization", "classification"]


#: What an API server adds to an object: read past, so that `kubectl get -o yaml` is a job.
_OF_THE_SERVER = frozenset(
    {
        *("uid", "resourceVersion", "generation", "creationTimestamp", "deletionTimestamp", "selfLink"),
        *("deletionGracePeriodSeconds", "managedFields", "ownerReferences", "finalizers"),
    }
)


class Metadata(Part):
    """Kubernetes' own."""

    name: JobName
    namespace: Namespace | None = None
    labels: dict[MetadataKey, LabelValue] = Field(default={})
    annotations: dict[MetadataKey, str] = Field(default={})

    @model_validator(mode="before")
    @classmethod
    def _as_a_person_writes_it(cls, raw: Any) -> Any:
        return {key: raw[key] for key in raw if key not in _OF_THE_SERVER} if isinstance(raw, dict) else raw


class BaseModel_(Part):
    """modelId: a Hugging Face id, a directory or URI of one, or a GGUF file of the Llama family."""

    model_id: ModelUri
    revision: Text | None = Field(default=None, description="a commit, tag or branch of a hub's model")
    profile: Text | None = Field(default=None, description="the serving profile the result is meant for")
    trust_remote_code: Literal[False] = Field(default=False, description="never: a model brings no code of its own")

    @property
    def is_gguf(self) -> bool:
        """Then its weights are dequantised, and no engine has them: adapters over them have no base to be served on."""
        return self.model_id.endswith(".gguf")


class Distributed(Part):
    """workers: processes, one on each device. fsdp2 spreads weights, gradients and optimizer over them."""

    workers: Whole = Field(default=1, ge=1, le=4096)
    strategy: Literal["ddp", "fsdp2"] = "ddp"
    max_failures: Whole = Field(default=3, ge=0, description="worker losses the run survives by itself")

    @model_validator(mode="before")
    @classmethod
    def _deepspeed_is_fsdp2_here(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and raw.get("strategy") == "deepspeed":
            raise MisplacedError(("strategy",), "deepspeed is not built in; fsdp2 shards the same (ZeRO stage 3)")
        return raw


class KeepBest(Part):
    metric: Watched = "eval_loss"
    mode: Literal["min", "max"] = "min"


class Checkpoints(Part):
    """uri None: in the run's own directory. everySteps None: once an epoch."""

    uri: StoreUri | None = None
    every_steps: Whole | None = Field(default=None, ge=1)
    keep_last: Whole = Field(default=2, ge=1)
    keep_best: KeepBest | None = None
    resume: Literal["auto", "never"] = "auto"


class Output(Part):
    """registry: a directory, s3://, hf:// or oci://; None: the run's directory."""

    registry: ResultUri | None = None
    format: Literal["adapter", "merged"] | None = Field(
        default=None, description="None: adapter; of full, and over a GGUF base, merged"
    )
    gguf: Flag = Field(default=False, description="also as GGUF, for the embedded engine (Llama family)")
    profile: Literal["auto-generate", "none"] = "auto-generate"
    guardrail_policy: DataUri | None = Field(default=None, description="a policy file published beside the profile")
    inference_service: JobName | None = Field(
        default=None, description="the InferenceService that the operator makes of what was published (format merged)"
    )


class Resources(Part):
    """Of each worker, in Kubernetes' quantities. resource: the device plugin's name, as amd.com/cpx_nps4."""

    gpu: Whole = Field(default=0, ge=0, le=8)
    resource: ResourceName = "amd.com/gpu"
    cpu: Whole = Field(default=1, ge=1, le=1024)
    memory: Quantity | None = None
    shared_memory: Quantity = "8Gi"
    image: Image | None = None
    queue: Namespace | None = Field(default=None, description="Kueue's LocalQueue; Kueue then owns suspend")
    volume_claim: Namespace | None = Field(
        default=None, description="a PersistentVolumeClaim (ReadWriteMany), mounted at /workspace of every pod"
    )
    secret: Namespace | None = Field(
        default=None, description="a Secret whose keys become environment variables: AWS_ACCESS_KEY_ID, HF_TOKEN …"
    )


class Spec(Part):
    """What is asked. backoffLimit: new clusters that are tried after a failure, each resuming from the checkpoints."""

    base_model: BaseModel_
    method: Method = "lora"
    quantization: Literal["nf4", "int8"] | None = None
    template: Template = "chat"
    dataset: Dataset
    hyperparameters: Hyperparameters = Hyperparameters()
    distributed: Distributed = Distributed()
    checkpoints: Checkpoints = Checkpoints()
    validation: Validation = Validation()
    search: Search | None = None
    output: Output = Output()
    resources: Resources = Resources()
    suspend: Flag = Field(default=False, description="true: give the devices back, keep the checkpoints")
    backoff_limit: Whole = Field(default=0, ge=0, le=100)

    @model_validator(mode="before")
    @classmethod
    def _measures_of_a_classification(cls, raw: Any) -> Any:
        """What is measured where nothing is said: of a classification not perplexity, but accuracy and F1."""
        if not isinstance(raw, dict) or raw.get("template") != "classification":
            return raw
        validation = raw.get("validation", {})
        if not isinstance(validation, dict) or "metrics" in validation:
            return raw
        return {**raw, "validation": {**validation, "metrics": ["eval_loss", "accuracy", "f1"]}}

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        for place, why in contradictions(self):
            raise MisplacedError(place, why)
        return self


class FineTuningJob(Part):
    """The whole file. Read it by `job.read.read_job`, which names file and line of what is wrong."""

    api_version: Literal["aim.amd.com/v1alpha1"]
    kind: Literal["FineTuningJob"]
    metadata: Metadata
    spec: Spec

    @model_validator(mode="before")
    @classmethod
    def _status_is_told_not_asked(cls, raw: Any) -> Any:
        return {key: raw[key] for key in raw if key != "status"} if isinstance(raw, dict) else raw
