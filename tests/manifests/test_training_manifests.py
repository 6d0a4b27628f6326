"""manifests/training: the job's file as a RayJob, for the tenant's queue, and served by a sample."""

from __future__ import annotations

import pytest
import yaml

from aim_profile.files.write import dump_all
from aim_profile.gpus.catalog import by_name
from aim_profile.kubernetes.generated import MARK
from aim_profile.kubernetes.tenant import QUEUE, Tenant
from aim_profile.models.known import by_id, known_ids
from aim_profile.serving.derive import Wanted, derive
from aim_profile.serving.profile import Profile
from aim_trainer.job.job import FineTuningJob
from aim_trainer.job.read import read_job
from aim_trainer.render import render
from crd_schemas import CRDS, violations
from manifest_files import MANIFESTS, ROOT, Object, name_of, of_kind

FILE = MANIFESTS / "training/rayjob.yaml"
JOB_FILE = ROOT / "docs/samples/finetuning/cluster.yaml"

#: What the catalogue does not know enough of; the largest has 123 billion parameters, less than four cards' worth.
UNKNOWN = {
    "CohereForAI/aya-expanse-32b",
    "mistralai/Mistral-Large-Instruct-2407",
    "OdiaGenAI-LLM/qwen_1.5_odia_7b",
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
}


@pytest.fixture(scope="module")
def job() -> FineTuningJob:
    return read_job(JOB_FILE)


@pytest.fixture(scope="module")
def ray_job() -> Object:
    config, made = yaml.safe_load_all(FILE.read_text(encoding="utf-8"))
    assert config["kind"] == "ConfigMap"
    assert isinstance(made, dict)
    return made


def test_the_file_is_what_the_job_renders_to(job: FineTuningJob) -> None:
    assert FILE.read_text(encoding="utf-8") == f"# {MARK}\n" + dump_all(("", each) for each in render(job))


def test_a_cluster_takes_it_and_the_tenants_queue_counts_it(ray_job: Object) -> None:
    assert ray_job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == QUEUE
    (queue,) = of_kind("LocalQueue", "tenant")
    assert (name_of(queue), queue["spec"]["clusterQueue"]) == (QUEUE, Tenant().clusterQueue)
    if CRDS:
        assert violations(ray_job) == []


def test_what_it_publishes_is_what_the_sample_serves(job: FineTuningJob) -> None:
    (service,) = of_kind("InferenceService", "samples/tuned-model")
    base, adapter = (each["uri"] for each in service["spec"]["predictor"]["storageUris"])
    assert base == f"hf://{job.spec.base_model.model_id}"
    registry = str(job.spec.output.registry).removeprefix("/workspace/")
    assert adapter == f"pvc://{job.spec.resources.volume_claim}/{registry}/v1"


def test_no_model_of_the_catalogue_needs_a_second_node_of_eight_mi355x() -> None:
    """Why no runtime here has a workerSpec: five of the catalogue are too large for eight MI300X, none for MI355X."""
    names = [name for name in known_ids() if name not in UNKNOWN]
    refused: dict[str, set[str]] = {}
    for gpu in ("MI300X", "MI355X"):
        made = {name: derive(by_id(name), by_name(gpu).mode("SPX/NPS1"), Wanted(context=8192)) for name in names}
        assert max(found.metadata.gpu_count for found in made.values() if isinstance(found, Profile)) == 8
        refused[gpu] = {name for name, found in made.items() if not isinstance(found, Profile)}
    glm = {f"zai-org/GLM-{version}" for version in ("5", "5.1", "5.2", "5.3")}
    assert refused == {"MI300X": {"moonshotai/Kimi-K3", *glm}, "MI355X": set()}
