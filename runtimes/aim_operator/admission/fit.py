"""Whether what an InferenceService asks for is there, and whether its model fits on it."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

from aim_profile.errors import AimProfileError, UnknownModelError
from aim_profile.gpus.catalog import PartitionMode, by_name
from aim_profile.models.facts import ModelFacts
from aim_profile.models.known import by_id
from aim_profile.serving.derive import Refusal, Wanted, derive
from aim_profile.serving.profile import to_model_precision
from aim_profile.sizing.alternatives import size_on
from aim_profile.sizing.fit import DoesNotFit, default_context, make_request
from aim_runtime.settings import RuntimeSettings

from .denied import Denied
from .nodes import Devices, known_resources
from .service import Service

_MOST_REMEDIES = 3
_RESOURCES = "spec.predictor.model.resources"


def check(service: Service, devices: Devices) -> Sequence[str]:
    """Warnings: what could not be judged here. Raises Denied."""
    asked = service.devices()
    for path, resource, count in asked:
        _is_there(path, resource, count, devices)
    if len(asked) > 1:
        names = ", ".join(resource for _, resource, _ in asked)
        raise Denied(_RESOURCES, names, "a model runs on devices of one kind", "ask for one of them, or name aim-vllm")
    if not asked:
        return ()
    path, resource, count = asked[0]
    return _fits(service, path, count, _modes(service, path, resource, devices))


def _is_there(path: str, resource: str, count: int, devices: Devices) -> None:
    there = devices.resources
    has = ", ".join(f"{name} ({most} on a node)" for name, most in there.items()) or "none of AMD's"
    if resource not in known_resources():
        near = get_close_matches(resource, known_resources(), 1)
        remedy = f"did you mean {near[0]}? the nodes have {has}" if near else f"the nodes have {has}"
        raise Denied(path, resource, "the device plugin has no resource of that name", remedy)
    if resource not in there:
        raise Denied(
            path, resource, "no node has it", f"the nodes have {has}: ask for one of these, or plan the mode first"
        )
    if count > there[resource]:
        remedy = f"ask for at most {there[resource]}, or for larger devices"
        raise Denied(path, count, f"no node has so many of {resource}", remedy)


def _modes(service: Service, path: str, resource: str, devices: Devices) -> list[PartitionMode]:
    """What the devices may be, by the annotations' own word where they have one."""
    told = RuntimeSettings.of_annotations(service.seen_by("predictor"))
    found = devices.modes(resource)
    for name, word in (("compute", told.compute_partition), ("memory", told.memory_partition)):
        kept = [mode for mode in found if word is None or getattr(mode, name) == word]
        if found and not kept:
            known = " or ".join(sorted({getattr(mode, name) for mode in found}))
            field = f"metadata.annotations[aim.amd.com/{name}-partition]"
            raise Denied(field, word, f"{path} asks for {resource}", f"write {known}, or ask for another resource")
        found = kept
    return found


def _fits(service: Service, path: str, count: int, modes: Sequence[PartitionMode]) -> Sequence[str]:
    if not modes:
        return (f"{path}: which GPUs the nodes have is not known (no amd.com/gpu.device-id): the fit was not checked",)
    if service.model_id is None:
        return (
            f"spec.predictor.model.storageUri {service.storage_uri}: its needs are known once the runtime reads it",
        )
    try:
        model = by_id(service.model_id)
    except UnknownModelError:
        return (
            f"spec.predictor.model.storageUri: {service.model_id} is not in the catalogue: the fit was not checked",
        )
    refused = [_refused(service, model, mode, count) for mode in modes]
    if all(refused):
        raise next(filter(None, refused))
    return ()


def wanted(service: Service, count: int | None) -> Wanted:
    """What the annotations and flags ask a profile for."""
    told = RuntimeSettings.of_annotations(service.seen_by("predictor"))
    context = service.flag("max_model_len") or told.max_model_len
    return Wanted(
        precision=to_model_precision(told.precision) if told.precision else None,
        metric=told.metric or "latency",
        context=int(context) if context and str(context).isdecimal() else None,
        tensor_parallel=count,
        memory_limit_bytes=told.memory_limit,
        qos_priority=told.qos_priority,
    )


def _refused(service: Service, model: ModelFacts, mode: PartitionMode, count: int) -> Denied | None:
    asked = wanted(service, count)
    place = f"{count} x {mode.accelerator} {mode.label}"
    try:
        found = derive(model, mode, asked)
        if not isinstance(found, Refusal):
            return None
        remedies = _remedies(model, mode, asked, count)
    except AimProfileError as error:
        return denied(error)
    return Denied("spec.predictor.model.storageUri", service.storage_uri, f"{found.reason} ({place})", remedies)


def denied(error: AimProfileError) -> Denied:
    """A refusal of aim_profile's, with the annotation that asked for it."""
    name = {"context": "max-model-len", "gpu_count": "partition-count", "memory_limit": "memory-limit"}.get(error.field)
    return Denied(f"metadata.annotations[aim.amd.com/{name or error.field}]", error.value, error.problem, error.remedy)


def _remedies(model: ModelFacts, mode: PartitionMode, asked: Wanted, count: int) -> str:
    request = make_request(precision=asked.precision, context=asked.context or default_context(model), tp=count)
    sized = size_on(model, mode, by_name(mode.accelerator), request)
    options = sized.alternatives if isinstance(sized, DoesNotFit) else ()
    told = "; or ".join(option.description for option in options[:_MOST_REMEDIES])
    return told or f"`aim-profile fit {model.id}` names what it fits on"
