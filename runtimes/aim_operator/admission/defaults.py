"""What an InferenceService leaves out, filled in from its profile, as `aim-profile render` would have written it.

Only where it says which kind of device it wants: by `aim.amd.com/profile` (an id), or by both partition annotations, or
by the resource that its runtime or itself asks for. What it says itself stays as it is. What was filled in is noted,
and taken out again before it is filled in anew: another model of the same service gets its own.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from typing import Any

from aim_operator.notes import DEFAULTS
from aim_profile.errors import AimProfileError, UnknownModelError
from aim_profile.gpus.catalog import PartitionMode, by_name
from aim_profile.kubernetes.kserve import Service as Rendered
from aim_profile.kubernetes.kserve import inference_service, service_name
from aim_profile.kubernetes.target import Target
from aim_profile.models.known import by_id
from aim_profile.serving.derive import Refusal, derive, derive_from_id
from aim_profile.serving.profile import Profile, ProfileId, parse_id, parse_reference
from aim_runtime.settings import RuntimeSettings

from .fit import denied, wanted
from .nodes import Devices
from .service import Object, Service

#: Of a rendered service, what a hand-written one gets. Its scale and its name are its own.
_FILLED = ("affinity", "deploymentStrategy", "terminationGracePeriodSeconds", "automountServiceAccountToken")
_MERGED = ("labels", "nodeSelector")
_FILLED_OF_MODEL = ("args", "env", "resources")


def taken_out(body: Object) -> Object:
    """The service without what was filled in before and nobody has changed since."""
    done = copy.deepcopy(body)
    noted = (done["metadata"].get("annotations") or {}).pop(DEFAULTS, None)
    if noted is not None:
        _take_out(done, json.loads(noted))
    return done


def fill(service: Service, devices: Devices) -> Object:
    """The service, completed; as it is, where there is nothing to complete it from. Raises Denied."""
    if service.model_id is None or "model" not in service.predictor:
        return service.body
    try:
        profile = _profile(service, service.model_id, devices)
        if profile is None:
            return service.body
        name = service.body["metadata"].get("name") or service_name(service.model_id)
        target = Target(runtime=_target(service))
        rendered = inference_service(Rendered(name, profile, storage_uri=service.storage_uri), target)
    except UnknownModelError:
        return service.body
    except AimProfileError as error:
        raise denied(error) from None
    done = _completed(service.body, rendered)
    if added := _added(service.body, done):
        done["metadata"]["annotations"][DEFAULTS] = json.dumps(added, sort_keys=True)
    return done


def _target(service: Service) -> str:
    # What it says of GPUs is its own; a runtime that asks for a partition has been held against it.
    return service.runtime_name or "aim-vllm"


def _profile(service: Service, model_id: str, devices: Devices) -> Profile | None:
    """None: it does not say on what it shall run, or nothing here is so: then the validating webhook says that."""
    told = RuntimeSettings.of_annotations(service.seen_by("predictor"))
    if told.profile is not None:
        parts = _id(told.profile)
        return None if parts is None else derive_from_id(model_id, parts, wanted(service, parts.gpu_count))
    asked = service.devices()
    modes: list[PartitionMode] = []
    if len(asked) == 1:
        modes = devices.modes(asked[0][1])
    elif told.compute_partition and told.memory_partition:
        label = f"{told.compute_partition}/{told.memory_partition}"
        products = sorted({offer.accelerator for offer in devices.offers if offer.accelerator})
        modes = [mode for name in products for mode in by_name(name).modes() if mode.label == label]
    count = asked[0][2] if len(asked) == 1 else told.partition_count
    derived = [derive(by_id(model_id), mode, wanted(service, count)) for mode in modes]
    return next((each for each in derived if not isinstance(each, Refusal)), None)


def _id(text: str) -> ProfileId | None:
    """Of an id, or of MODEL/ID; None: a profile of a file."""
    if re.search(r"\.ya?ml$", text):
        return None
    return parse_reference(text)[1] if "/" in text else parse_id(text)


def _completed(body: Object, rendered: Mapping[str, Any]) -> Object:
    done = copy.deepcopy(body)
    annotations = done["metadata"].setdefault("annotations", {})
    for key, value in rendered["metadata"]["annotations"].items():
        annotations.setdefault(key, value)
    predictor, from_profile = done["spec"]["predictor"], rendered["spec"]["predictor"]
    for key in _FILLED:
        if key in from_profile:
            predictor.setdefault(key, from_profile[key])
    for key in _MERGED:
        if key in from_profile:
            predictor[key] = _with(predictor.get(key), from_profile[key])
    for key in _FILLED_OF_MODEL:
        if key in from_profile["model"]:
            predictor["model"][key] = _with(predictor["model"].get(key), from_profile["model"][key])
    return done


def _added(before: Object, after: Object) -> Object:
    """What of `after` is not in `before`: mappings field by field, lists item by item."""
    found: Object = {}
    for key, value in after.items():
        if key not in before:
            found[key] = value
        elif isinstance(value, dict) and (inner := _added(before[key], value)):
            found[key] = inner
        elif isinstance(value, list) and (items := [each for each in value if each not in before[key]]):
            found[key] = items
    return found


def _take_out(value: Object, added: Mapping[str, Any]) -> None:
    for key, inner in added.items():
        if key not in value:
            continue
        if value[key] == inner:
            del value[key]
        elif isinstance(inner, dict) and isinstance(value[key], dict):
            _take_out(value[key], inner)
        elif isinstance(inner, list) and isinstance(value[key], list):
            value[key] = [each for each in value[key] if each not in inner]


def _with(own: Any, default: Any) -> Any:
    """What is written wins: mappings field by field, variables by name, arguments by flag."""
    if own is None:
        return copy.deepcopy(default)
    if isinstance(own, dict):
        return {key: _with(own.get(key), default.get(key, own.get(key))) for key in dict.fromkeys((*own, *default))}
    if isinstance(own, list):
        named = {_named(each) for each in own}
        return [*own, *(each for each in default if _named(each) not in named)]
    return own


def _named(each: Any) -> str:
    """Of a variable or a flag."""
    return str(each["name"]) if isinstance(each, dict) else str(each).partition("=")[0].replace("-", "_")
