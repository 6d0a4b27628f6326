"""A FineTuningJob brought to pass: a RayJob of it, kept suspended as it is, told of in its status, served at its end.

KubeRay carries the RayJob out and tries again; Kueue suspends it where the job has a queue. A RayJob is made anew only
where it is not running: suspended with another spec, or failed and edited since. Its run goes on from the newest
checkpoint on the volume.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Literal

from aim_operator.audit import Audit
from aim_operator.cluster import CONFIG_MAPS, FINE_TUNING_JOBS, INFERENCE_SERVICES, RAY_JOBS, Cluster, Object
from aim_operator.events import tell
from aim_profile.errors import AimProfileError
from aim_trainer.errors import TrainerError

from . import serving
from .objects import DIGEST, GENERATION, Made, Reports, made_of
from .state import Now, conditions, state_of

#: Between two looks at a job of which nobody tells anything; what changes rings.
REST_S, _SOON_S = 60.0, 2.0
KIND = "FineTuningJob"


class Reconciler:
    """reports: where pods tell how far they are, None: nowhere. Every call raises ApiError, and may be made again."""

    def __init__(
        self,
        cluster: Cluster,
        audit: Audit,
        reports: Callable[[], Reports | None],
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._cluster, self._audit, self._reports, self._now = cluster, audit, reports, now

    async def once(self, name: str, namespace: str) -> float | None:
        """One look. Returns the seconds until the next; None where there is no such job, or it is going."""
        job = await self._cluster.get(FINE_TUNING_JOBS, name, namespace)
        if job is None or "deletionTimestamp" in job["metadata"]:
            return None
        return await _Look(self._cluster, self._audit, job, self._now()).step(self._reports())


class _Look:
    def __init__(self, cluster: Cluster, audit: Audit, job: Object, now: datetime) -> None:
        self._cluster, self._audit, self._job, self._now = cluster, audit, job, now
        self._name: str = job["metadata"]["name"]
        self._namespace: str = job["metadata"]["namespace"]
        self._generation: int = job["metadata"].get("generation", 1)
        self._status: Mapping[str, Any] = job.get("status") or {}

    async def step(self, reports: Reports | None) -> float:
        try:
            made = made_of(self._job, reports)
        except (TrainerError, AimProfileError) as problem:
            await self._tell("Warning", "JobRefused", str(problem))
            await self._put(Now("Failed", "JobRefused", str(problem)))
            return REST_S
        ray_job = await self._cluster.get(RAY_JOBS, self._name, self._namespace)
        if ray_job is None:
            return await self._begin(made)
        if not self._is_ours(ray_job):
            taken = f"there is a RayJob {self._name} already that is not this job's: rename one of them"
            await self._tell("Warning", "NameTaken", taken)
            await self._put(Now("Failed", "NameTaken", taken))
            return REST_S
        if "deletionTimestamp" in ray_job["metadata"]:
            return _SOON_S
        return await self._keep(made, ray_job)

    def _is_ours(self, found: Mapping[str, Any]) -> bool:
        owners = found["metadata"].get("ownerReferences") or ()
        return any(each.get("uid") == self._job["metadata"]["uid"] for each in owners)

    async def _begin(self, made: Made) -> float:
        """Not again what is complete: KubeRay or a person may have taken the RayJob away since."""
        if any(
            each["type"] == "Complete" and each["status"] == "True" for each in self._status.get("conditions") or ()
        ):
            return await self._serve()
        await self._cluster.apply(CONFIG_MAPS, made.config_map)
        ray_job = await self._cluster.apply(RAY_JOBS, made.ray_job)
        self._audited("create", "ok")
        await self._tell("Normal", "RayJobCreated", f"RayJob {self._name}, {made.digest[:12]}")
        await self._put(state_of(ray_job))
        return REST_S

    async def _keep(self, made: Made, ray_job: Object) -> float:
        now = state_of(ray_job)
        notes = ray_job["metadata"].get("annotations") or {}
        edited = notes.get(DIGEST) != made.digest
        again = now.state == "Failed" and int(notes.get(GENERATION, self._generation)) < self._generation
        if again or (edited and now.state == "Suspended"):
            await self._cluster.delete(RAY_JOBS, self._name, self._namespace)
            self._audited("retry" if again else "replace", "ok")
            why = "it was edited after it failed" if again else "it was edited while it was suspended"
            await self._tell("Normal", "RayJobReplaced", f"{why}: the run goes on from its newest checkpoint")
            return _SOON_S
        if edited and now.state in ("Created", "Running"):
            told = "its spec was edited while it runs: nothing is changed until it is suspended, or has failed"
            await self._tell("Warning", "SpecEdited", told)
            now = Now(now.state, "SpecEdited", told)
        wanted = made.ray_job["spec"].get("suspend")
        if (
            wanted is not None
            and bool(ray_job["spec"].get("suspend")) != wanted
            and now.state not in ("Failed", "Complete")
        ):
            await self._cluster.patch(RAY_JOBS, self._name, {"spec": {"suspend": wanted}}, self._namespace)
            self._audited("suspend" if wanted else "resume", "ok")
            await self._tell("Normal", "Suspending" if wanted else "Resuming", "as spec.suspend says")
        await self._put(now)
        return await self._serve() if now.state == "Complete" else REST_S

    async def _serve(self) -> float:
        """The InferenceService that the job asks for, once what was published is known; made once, then a person's."""
        wanted = (self._job["spec"].get("output") or {}).get("inferenceService")
        uri = self._status.get("published")
        if not wanted or not uri:
            return REST_S
        if await self._cluster.get(INFERENCE_SERVICES, wanted, self._namespace) is not None:
            return REST_S
        kept = await self._cluster.get(CONFIG_MAPS, serving.config_map_name(self._name), self._namespace)
        try:
            body = serving.service(wanted, uri, kept, self._job)
        except AimProfileError as problem:
            await self._tell("Warning", "NotServed", str(problem))
            return REST_S
        await self._cluster.create(INFERENCE_SERVICES, body)
        self._audited("serve", "ok", service=wanted)
        await self._tell("Normal", "Served", f"InferenceService {wanted} of {uri}")
        return REST_S

    def _audited(self, action: str, outcome: str, **more: Any) -> None:
        self._audit(f"{action}_job", KIND, f"{self._namespace}/{self._name}", outcome=outcome, **more)

    async def _tell(self, kind: Literal["Normal", "Warning"], reason: str, message: str) -> None:
        await tell(self._cluster, self._job, kind, reason, message, str(self._generation))

    async def _put(self, now: Now) -> None:
        told = conditions(now, self._status.get("conditions") or [], self._generation, self._now)
        status = {"conditions": told, "rayJob": self._name}
        if any(self._status.get(key) != value for key, value in status.items()):
            await self._cluster.patch(FINE_TUNING_JOBS, self._name, {"status": status}, self._namespace, status=True)
