"""A FineTuningJob becomes a RayJob, is paused and goes on, is told of, and is served at its end."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from aim_operator.cluster import TOKEN_REVIEWS, Resource
from aim_operator.finetuning.objects import JOB_LABEL, Reports, made_of
from aim_operator.finetuning.reconcile import Reconciler
from aim_operator.finetuning.reports import Server
from aim_operator.finetuning.state import conditions, state_of
from aim_profile.gpus.catalog import by_name
from aim_profile.models.load import load_model
from aim_profile.serving.derive import Wanted, derive
from aim_profile.serving.files import as_ours
from aim_profile.serving.profile import Profile
from kube_memory import Memory, MemoryCluster
from operator_process import certificates

JOBS = "/apis/aim.amd.com/v1alpha1/namespaces/team/finetuningjobs"
RAY_JOBS = "/apis/ray.io/v1/namespaces/team/rayjobs"
MAPS = "/api/v1/namespaces/team/configmaps"
SERVICES = "/apis/serving.kserve.io/v1beta1/namespaces/team/inferenceservices"
REPORTS = Reports("https://aim-operator.aim-system.svc:9444", "-----BEGIN CERTIFICATE-----")


def job(**spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "aim.amd.com/v1alpha1",
        "kind": "FineTuningJob",
        "metadata": {"name": "bot", "annotations": {"kubectl.kubernetes.io/last-applied-configuration": "{}"}},
        "spec": {
            "baseModel": {"modelId": "Qwen/Qwen3-8B"},
            "dataset": {"source": "s3://data/chats.jsonl"},
            "output": {"registry": "s3://models/bot"},
            "resources": {"gpu": 1, "volumeClaim": "runs"},
            **spec,
        },
    }


class World:
    def __init__(self) -> None:
        self.kubernetes = Memory()
        self.time = datetime(2026, 1, 1, tzinfo=UTC)
        self.trail: list[str] = []
        audit: Any = lambda action, *_, **__: self.trail.append(action)  # noqa: E731
        cluster = MemoryCluster(self.kubernetes)
        self.reconciler = Reconciler(cluster, audit, lambda: REPORTS, lambda: self.time)

    def look(self) -> float | None:
        self.time += timedelta(seconds=1)
        return asyncio.run(self.reconciler.once("bot", "team"))

    def edit(self, **spec: Any) -> None:
        self.kubernetes.patch(f"{JOBS}/bot", {"spec": spec})

    def kuberay(self, **status: Any) -> None:
        self.kubernetes.patch(f"{RAY_JOBS}/bot/status", {"status": status})

    def ray_job(self) -> dict[str, Any]:
        return self.kubernetes.read(f"{RAY_JOBS}/bot")

    def now(self) -> tuple[str, str]:
        """The state that the column shows, and its reason."""
        told = self.kubernetes.read(f"{JOBS}/bot")["status"]["conditions"]
        assert [each["status"] for each in told] == ["False"] * (len(told) - 1) + ["True"]
        return told[-1]["type"], told[-1]["reason"]

    def events(self) -> list[str]:
        return [each["reason"] for each in self.kubernetes.items("/api/v1/namespaces/team/events")]


@pytest.fixture
def world() -> World:
    found = World()
    found.kubernetes.create(JOBS, job())
    return found


def test_a_job_becomes_a_ray_job_whose_pods_can_tell(world: World) -> None:
    world.look()
    made = world.ray_job()
    (owner,) = made["metadata"]["ownerReferences"]
    assert owner["uid"] == world.kubernetes.read(f"{JOBS}/bot")["metadata"]["uid"]
    assert made["spec"]["suspend"] is False
    assert "kubectl.kubernetes.io/last-applied-configuration" not in made["metadata"]["annotations"]
    cluster = made["spec"]["rayClusterSpec"]
    for pod in (cluster["headGroupSpec"]["template"], cluster["workerGroupSpecs"][0]["template"]):
        env = {each["name"]: each["value"] for each in pod["spec"]["containers"][0]["env"]}
        assert env["KUBEFLOW_TRAINER_STATUS_URL"] == f"{REPORTS.url}/namespaces/team/finetuningjobs/bot/status"
        assert pod["metadata"]["labels"][JOB_LABEL] == "bot"
        tokens = [each["projected"]["sources"] for each in pod["spec"]["volumes"] if "projected" in each]
        assert tokens == [
            [{"serviceAccountToken": {"audience": "aim-operator", "expirationSeconds": 3600, "path": "token"}}]
        ]
    assert world.kubernetes.read(f"{MAPS}/bot-job")["data"]["ca.crt"] == REPORTS.authority
    assert world.now() == ("Created", "RayJobCreated")
    before = world.ray_job()
    world.look()
    assert world.ray_job() == before, "a second look changes nothing"
    assert world.events() == ["RayJobCreated"]


def test_it_is_paused_and_goes_on(world: World) -> None:
    world.look()
    world.kuberay(jobDeploymentStatus="Running", jobStatus="RUNNING")
    world.look()
    assert world.now() == ("Running", "Running")
    world.edit(suspend=True)
    world.look()
    assert world.ray_job()["spec"]["suspend"] is True
    world.kuberay(jobDeploymentStatus="Suspended", jobStatus="STOPPED")
    world.look()
    assert world.now() == ("Suspended", "Suspended")
    uid = world.ray_job()["metadata"]["uid"]
    world.edit(suspend=False)
    world.look()
    assert world.ray_job()["spec"]["suspend"] is False
    assert world.ray_job()["metadata"]["uid"] == uid, "the same RayJob goes on"
    assert world.trail == ["create_job", "suspend_job", "resume_job"]


def test_kueue_owns_suspend_where_there_is_a_queue(world: World) -> None:
    world.edit(resources={"queue": "team-queue"})
    world.look()
    assert "suspend" not in world.ray_job()["spec"]
    world.kubernetes.patch(f"{RAY_JOBS}/bot", {"spec": {"suspend": True}})
    world.look()
    assert world.ray_job()["spec"]["suspend"] is True, "as Kueue left it"


def test_what_failed_is_tried_again_once_it_is_edited(world: World) -> None:
    world.look()
    world.kuberay(jobDeploymentStatus="Failed", jobStatus="FAILED", reason="AppFailed", message="out of memory")
    world.look()
    assert world.now() == ("Failed", "AppFailed")
    uid = world.ray_job()["metadata"]["uid"]
    world.look()
    assert world.ray_job()["metadata"]["uid"] == uid, "not by itself: KubeRay has tried as often as it was told"
    world.edit(backoffLimit=3)
    world.look()
    world.look()
    assert world.ray_job()["metadata"]["uid"] != uid
    assert world.ray_job()["spec"]["backoffLimit"] == 3
    assert "RayJobReplaced" in world.events()
    assert world.now()[0] == "Created"


def test_an_edit_while_it_runs_is_named_and_waits(world: World) -> None:
    world.look()
    world.kuberay(jobDeploymentStatus="Running", jobStatus="RUNNING")
    uid = world.ray_job()["metadata"]["uid"]
    world.edit(hyperparameters={"learningRate": 0.0005})
    world.look()
    assert world.now() == ("Running", "SpecEdited")
    assert "SpecEdited" in world.events()
    assert world.ray_job()["metadata"]["uid"] == uid
    world.edit(suspend=True)
    world.look()
    world.kuberay(jobDeploymentStatus="Suspended", jobStatus="STOPPED")
    world.look()
    world.look()
    assert world.ray_job()["metadata"]["uid"] != uid
    assert "0.0005" in world.kubernetes.read(f"{MAPS}/bot-job")["data"]["job.yaml"]


def test_a_job_that_cannot_run_is_refused_by_field(world: World) -> None:
    world.edit(dataset={"source": "/home/me/chats.jsonl"})
    world.look()
    assert world.now() == ("Failed", "JobRefused")
    told = world.kubernetes.read(f"{JOBS}/bot")["status"]["conditions"][-1]["message"]
    assert "spec.dataset.source: /home/me/chats.jsonl is not in the pods" in told
    assert not world.kubernetes.exists(f"{RAY_JOBS}/bot")
    assert "JobRefused" in world.events()


def test_another_ray_job_of_that_name_is_left_alone(world: World) -> None:
    theirs = world.kubernetes.create(RAY_JOBS, {"metadata": {"name": "bot"}, "spec": {"entrypoint": "theirs"}})
    world.look()
    assert world.now() == ("Failed", "NameTaken")
    assert world.ray_job() == theirs


@pytest.mark.parametrize(
    ("status", "state", "said"),
    [
        ({}, "Created", "waits for its pods"),
        ({"jobDeploymentStatus": "Retrying", "failed": 1}, "Running", "try 2: goes on from the newest checkpoint"),
        ({"jobDeploymentStatus": "Running", "failed": 2}, "Running", "try 3: goes on from the newest checkpoint"),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "FAILED"}, "Failed", "the run failed; its report says why"),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}, "Complete", "trained, judged and published"),
        ({"jobDeploymentStatus": "Suspending"}, "Suspended", "its devices are given back, its checkpoints kept"),
    ],
)
def test_what_kuberay_says(status: Mapping[str, Any], state: str, said: str) -> None:
    now = state_of({"status": status})
    assert (now.state, now.message) == (state, said)


def test_the_time_of_a_condition_that_stays_stays() -> None:
    first = conditions(state_of({}), [], 1, datetime(2026, 1, 1, tzinfo=UTC))
    again = conditions(state_of({}), first, 1, datetime(2026, 1, 2, tzinfo=UTC))
    assert again == first


# --- what its pods tell -------------------------------------------------------------------------------------------


class Reviewing(MemoryCluster):
    """An API server that knows whose tokens are whose."""

    async def create(self, resource: Resource, body: dict[str, Any]) -> dict[str, Any] | None:
        if resource != TOKEN_REVIEWS:
            return await super().create(resource, body)
        audiences = body["spec"]["audiences"]
        namespace, _, pod = body["spec"]["token"].partition("/")
        user = {"username": f"system:serviceaccount:{namespace}:default"}
        user |= {"extra": {"authentication.kubernetes.io/pod-name": [pod]}} if pod else {}
        return {"status": {"authenticated": namespace != "bad", "audiences": audiences, "user": user}}


class Pods:
    """The pods of the job, and the server they tell."""

    def __init__(self, world: World, folder: Path) -> None:
        self.kubernetes, self.folder = world.kubernetes, certificates(folder, "127.0.0.1")
        pods = "/api/v1/namespaces/team/pods"
        self.kubernetes.create(pods, {"metadata": {"name": "head", "labels": {JOB_LABEL: "bot"}}})
        self.kubernetes.create(pods, {"metadata": {"name": "other", "labels": {JOB_LABEL: "another"}}})

    def tell(self, what: str, body: object, token: str = "team/head") -> tuple[int, str]:
        return asyncio.run(self._tell(what, body, token))

    async def _tell(self, what: str, body: object, token: str) -> tuple[int, str]:
        server = Server(Reviewing(self.kubernetes))
        port = await server.serve("127.0.0.1", 0, self.folder)
        tls = ssl.create_default_context(cafile=str(self.folder / "ca.crt"))
        url = f"https://127.0.0.1:{port}/namespaces/team/finetuningjobs/bot/{what}"
        text = body if isinstance(body, str) else json.dumps(body)
        try:
            async with aiohttp.ClientSession() as session:
                headers = {"Authorization": f"Bearer {token}"}
                async with session.post(url, data=text, headers=headers, ssl=tls) as response:
                    return response.status, await response.text()
        finally:
            await server.close()

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self.kubernetes.read(f"{JOBS}/bot").get("status", {})
        return found


@pytest.fixture
def pods(world: World, tmp_path: Path) -> Pods:
    return Pods(world, tmp_path / "certificates")


def test_pods_tell_how_far_they_are(pods: Pods) -> None:
    metrics = [{"name": "loss", "value": "1.25"}, {"name": "currentStep", "value": "12"}]
    told = {"progressPercentage": 30, "estimatedRemainingSeconds": 400, "metrics": metrics}
    assert pods.tell("status", {"trainerStatus": told})[0] == 200
    assert pods.status()["trainerStatus"] == told
    assert pods.tell("status", {"trainerStatus": {"progressPercentage": 31, "metrics": metrics}})[0] == 200
    assert "estimatedRemainingSeconds" not in pods.status()["trainerStatus"], "not known any more"


@pytest.mark.parametrize(
    ("token", "body", "code", "said"),
    [
        ("", {}, 401, "Authorization: Bearer"),
        ("bad/head", {}, 401, "not one for aim-operator"),
        ("elsewhere/head", {}, 403, "of no pod in team"),
        ("team", {}, 403, "of no pod in team"),
        ("team/other", {}, 403, "pod other is none of job bot"),
        ("team/gone", {}, 403, "pod gone is none of job bot"),
        ("team/head", "{", 422, "not JSON"),
        ("team/head", [], 422, "not a JSON object"),
        ("team/head", {}, 422, "trainerStatus"),
    ],
)
def test_who_may_not_tell(pods: Pods, token: str, body: object, code: int, said: str) -> None:
    answered, text = pods.tell("status", body, token)
    assert (answered, said in text) == (code, True), text
    assert "trainerStatus" not in pods.status()


def profile_text() -> str:
    found = derive(load_model("Qwen/Qwen3-8B"), by_name("MI300X").mode("CPX/NPS4"), Wanted(context=4096))
    assert isinstance(found, Profile)
    return as_ours(found)


def test_what_was_published_is_kept_and_served(world: World, pods: Pods) -> None:
    world.edit(output={"format": "merged", "inferenceService": "bot"})
    world.look()
    assert pods.tell("published", {"uri": "s3://models/bot/v1", "profile": profile_text()})[0] == 200
    world.kuberay(jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")
    world.look()
    assert world.now()[0] == "Complete"
    assert world.kubernetes.read(f"{JOBS}/bot")["status"]["published"] == "s3://models/bot/v1"
    assert "serving-profile.yaml" in world.kubernetes.read(f"{MAPS}/bot-profile")["data"]
    made = world.kubernetes.read(f"{SERVICES}/bot")["spec"]["predictor"]["model"]
    assert (made["storageUri"], made["runtime"]) == ("s3://models/bot/v1", "aim-vllm")
    assert made["resources"]["limits"]["amd.com/cpx_nps4"] == "1"
    world.kubernetes.delete(f"{RAY_JOBS}/bot")
    world.look()
    assert not world.kubernetes.exists(f"{RAY_JOBS}/bot"), "what is complete is not begun again"
    assert world.events().count("Served") == 1


@pytest.mark.parametrize(
    ("output", "uri", "said"),
    [
        ({"inferenceService": "bot"}, "s3://models/bot/v1", "output.format: adapter"),
        ({"inferenceService": "bot", "format": "merged"}, "/workspace/out", "output.registry: /workspace/out"),
    ],
)
def test_what_cannot_be_served_is_said(world: World, pods: Pods, output: dict[str, str], uri: str, said: str) -> None:
    world.edit(output=output)
    world.look()
    pods.tell("published", {"uri": uri, "profile": profile_text()})
    world.kuberay(jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")
    world.look()
    (event,) = [
        each for each in world.kubernetes.items("/api/v1/namespaces/team/events") if each["reason"] == "NotServed"
    ]
    assert said in event["message"]


def test_a_profile_that_is_none_is_refused(pods: Pods) -> None:
    code, text = pods.tell("published", {"uri": "s3://models/bot/v1", "profile": "aim_id: 3"})
    assert code == 422
    assert "profile: " in text
    assert "published" not in pods.status()


def test_the_digest_is_of_the_work_alone() -> None:
    raw = job() | {"metadata": {"name": "bot", "namespace": "team", "uid": "u", "generation": 1}}
    suspended = raw | {"spec": {**raw["spec"], "suspend": True}}
    assert made_of(raw, REPORTS).digest == made_of(suspended, REPORTS._replace(authority="renewed")).digest
    other = raw | {"spec": {**raw["spec"], "method": "full"}}
    assert made_of(raw, REPORTS).digest != made_of(other, REPORTS).digest
