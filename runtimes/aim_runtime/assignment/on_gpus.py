"""A model on GPUs: the kind of device, the profile, the sum, the devices themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from aim_profile.errors import AimProfileError
from aim_profile.gpus.catalog import by_name
from aim_profile.models.facts import ModelFacts, Precision
from aim_profile.serving.check import sizing_request
from aim_profile.serving.derive import Refusal, Wanted, derive
from aim_profile.serving.engine_args import DeviceShare, share_of
from aim_profile.serving.profile import Profile, devices_side_by_side, to_model_precision
from aim_profile.serving.selection import Devices, Wish, select, wrong_device
from aim_profile.sizing.alternatives import size_on
from aim_profile.sizing.fit import DoesNotFit, Fit, Request, default_context, fit, make_request
from aim_runtime.settings import RuntimeSettings

from .arguments import SIZED_BY, Flags, agreed, check_parallelism, fraction, named, of_profile, whole_number
from .devices import Kind, check_count, check_limit, kinds_of, side_by_side
from .facts import Assignment, Basis, Case, Refused, does_not_fit, notes_of
from .visibility import visible

#: Of the flags that are computed, those that SGLang has too: sizes by settings of its engine, the others by this name.
_SGLANG = (*SIZED_BY, "gpu-memory-utilization", "dtype", "quantization")


def assign_gpus(case: Case) -> Assignment:
    """The first kind of device here that holds the model as asked; one that must span partitions only if no other does.

    Raises:
        Refused: none does; of several, the one that misses by least.
    """
    unproven: list[Assignment] = []
    misses: list[Refused] = []
    for kind in kinds_of(case):
        try:
            found = _on(kind, case)
            if found.evidence.measured or not found.evidence.unproven:
                return found
            unproven.append(found)
        except Refused as miss:
            misses.append(miss)
        except AimProfileError as error:
            misses.append(Refused.because(error))
    if unproven:
        return unproven[0]
    raise min(misses, key=lambda miss: float("inf") if miss.shortfall_gib is None else miss.shortfall_gib)


def _on(kind: Kind, case: Case) -> Assignment:
    settings = case.settings
    user = _given(case)
    check_parallelism(user)
    check_limit(kind, settings)
    check_count(kind, case)
    asked = agreed(settings, case.engine, user)
    if not case.model.sizable:
        return _unsized(kind, case, {**user, **asked})
    profile, unseen = _with_evidence(_profile(kind, case, case.model, asked), case)
    own, notes = of_profile(profile.engine_args)
    flags = _sized({**own, **user, **asked}, kind, settings)
    flags = flags if case.engine == "vllm" else {name: flags[name] for name in flags if name in {*_SGLANG, *user}}
    answer = _fit(kind, settings, case.model, profile, flags, asked)
    built = _assigned(kind, case, flags, profile.env_vars, measured=profile.evidence.measured)
    notes = (*built.evidence.notes, *notes, *profile.evidence.notes, unseen, *answer.notes)
    return built.model_copy(
        update={
            "fit": answer.model_dump(mode="json", exclude={"alternatives"}),
            "profile": profile.reference,
            "evidence": built.evidence.model_copy(update={"notes": notes_of(notes)}),
        }
    )


def _given(case: Case) -> Flags:
    """The user's own flags, by vLLM's names."""
    options = case.settings.engine_options(case.engine)
    user = named(options.get("engine_args", ()))
    share = options.get("mem_fraction_static")
    return user if share is None else {**user, "gpu-memory-utilization": share}


def _unsized(kind: Kind, case: Case, flags: Flags) -> Assignment:
    """Raises Refused, unless the settings say to start all the same."""
    why = case.model.status
    if case.settings.unsized == "refuse":
        raise Refused(
            f"whether the model fits {kind.label} cannot be said: {why}",
            field="model",
            value=str(case.settings.model_dir),
            remedy="--unsized=start starts it all the same, and leaves its memory to the engine",
        )
    built = _assigned(kind, case, _sized({"tensor-parallel-size": 1, **flags}, kind, case.settings), {}, measured=False)
    notes = (*built.evidence.notes, f"not sized: {why}")
    return built.model_copy(update={"evidence": built.evidence.model_copy(update={"notes": notes})})


def _assigned(kind: Kind, case: Case, flags: Flags, variables: Mapping[str, str], *, measured: bool) -> Assignment:
    tensor_parallel = whole_number(flags, "tensor-parallel-size") or 1
    devices, note = side_by_side(kind, tensor_parallel, case.settings, in_pod=case.in_pod)
    idle = len(kind.devices) - len(devices)
    left = (
        f"{idle} of the {len(kind.devices)} devices here stay unused"
        if case.in_pod and idle and case.bound is None
        else ""
    )
    return Assignment(
        engine=case.engine,
        model=case.settings.model_name,
        model_dir=case.settings.model_dir,
        devices=devices,
        engine_args=flags,
        env={**_meant_for(case.engine, variables), **visible(case.node, devices, in_pod=case.in_pod)},
        evidence=Basis(
            node=case.node.backend,
            gpu=kind.mode.accelerator,
            mode=kind.mode.label,
            tier=kind.mode.tier,
            measured=measured,
            unproven=kind.mode.unproven(tensor_parallel),
            notes=notes_of((*kind.notes, note, left)),
        ),
    )


def _meant_for(engine: str, variables: Mapping[str, str]) -> dict[str, str]:
    """A profile is written for vLLM: its variables are nobody else's."""
    return {name: value for name, value in variables.items() if engine == "vllm" or not name.startswith("VLLM_")}


def _profile(kind: Kind, case: Case, model: ModelFacts, asked: Mapping[str, int]) -> Profile:
    """The profile that was named, else the best of those stored, else the one derived for these devices."""
    if case.given is not None:
        _check_given(case.given, kind, case.settings, asked)
        return case.given
    for number in _numbers(kind, case, asked) if case.stored else ():
        wish = Wish("vllm", case.settings.metric, case.settings.precision)
        found = select(model, Devices(kind.mode, number, kind.alloc_mode), wish, case.stored)
        if found.chosen and not found.relaxed and found.chosen in [item.profile for item in case.stored]:
            return found.chosen
    return _derived(kind, case.settings, model, asked)


def _with_evidence(profile: Profile, case: Case) -> tuple[Profile, str]:
    """The profile with the figures that speak for it, and a note where none do. Raises AimProfileError."""
    if case.evidence is None:
        return profile, ""
    found = case.evidence.on(profile)
    return found, case.evidence.passed_over(found) or ""


def _numbers(kind: Kind, case: Case, asked: Mapping[str, int]) -> Sequence[int]:
    """Device counts to look for a profile for: the one asked for; in a pod all that are here first, elsewhere few."""
    if count := asked.get("tensor-parallel-size"):
        return (count,)
    return sorted((n for n in _counts(kind) if n <= len(kind.devices)), reverse=case.in_pod)


def _derived(kind: Kind, settings: RuntimeSettings, model: ModelFacts, asked: Mapping[str, int]) -> Profile:
    """The profile for as few of these devices as hold the model. Raises Refused."""
    wanted = Wanted(
        precision=_precision(settings),
        metric=settings.metric or "latency",
        context=asked.get("max-model-len"),
        concurrency=asked.get("max-num-seqs"),
        tensor_parallel=asked.get("tensor-parallel-size"),
        alloc_mode=kind.alloc_mode,
        memory_limit_bytes=settings.memory_limit,
    )
    found = derive(model, kind.mode, wanted)
    if not isinstance(found, Refusal) and found.metadata.gpu_count > len(kind.devices):
        # More than are here would hold it: say by how much these few miss.
        most = max(n for n in _counts(kind) if n <= len(kind.devices))
        found = derive(model, kind.mode, wanted.model_copy(update={"tensor_parallel": wanted.tensor_parallel or most}))
    if not isinstance(found, Refusal):
        return _as_the_files_are(found, model)
    request = make_request(
        precision=wanted.precision,
        context=wanted.context or default_context(model),
        concurrency=wanted.concurrency or 1,
        utilization=_share(kind, settings).utilization,
    )
    if found.shortfall_gib is None:
        raise Refused(f"{model.id}: {found.reason}", field="model", value=model.id, remedy="see `aim-profile fit`")
    raise does_not_fit(model, found.reason, _with_options(kind, model, request), found.shortfall_gib)


def _with_options(kind: Kind, model: ModelFacts, request: Request) -> Fit | DoesNotFit:
    return size_on(model, kind.mode, by_name(kind.mode.accelerator), request, kind.mode.memory_bytes)


def _as_the_files_are(profile: Profile, model: ModelFacts) -> Profile:
    """Raises Refused for a precision that the files, which are what is loaded, do not hold."""
    if profile.evidence.weights == "needs a quantised checkpoint" and model.from_files:
        wanted = profile.metadata.precision
        raise Refused(
            f"precision {wanted}: the files hold {model.native_precision}",
            field="precision",
            value=wanted,
            remedy=f"leave precision out, or give a checkpoint in {wanted}",
        )
    return profile


def _counts(kind: Kind) -> tuple[int, ...]:
    return devices_side_by_side(by_name(kind.mode.accelerator), kind.mode)


def _precision(settings: RuntimeSettings) -> Precision | None:
    if settings.precision is None:
        return None
    found = to_model_precision(settings.precision)
    if found is None:
        raise Refused(
            f"precision {settings.precision}: nothing here is sized at it",
            field="precision",
            value=settings.precision,
            remedy="use bf16, fp16, fp8, int8, int4 or fp4, or leave it out",
        )
    return found


def _check_given(profile: Profile, kind: Kind, settings: RuntimeSettings, asked: Mapping[str, int]) -> None:
    """Raises Refused where a profile that somebody chose is not for these devices, or not what else is asked for."""
    kept = profile.metadata
    reason = wrong_device(profile, Devices(kind.mode, len(kind.devices), kind.alloc_mode))
    count = asked.get("tensor-parallel-size", kept.gpu_count)
    if reason is None and count != kept.gpu_count:
        reason = f"is for {kept.gpu_count} devices, asked for {count}"
    if reason is None and settings.precision not in (None, kept.precision):
        reason = f"is for {kept.precision}, asked for {settings.precision}"
    if reason is None and settings.metric not in (None, kept.metric):
        reason = f"is for {kept.metric}, asked for {settings.metric}"
    if reason:
        raise Refused(
            f"profile {profile.reference} {reason}",
            field="profile",
            value=profile.reference,
            remedy="name another, or leave it out: one is derived for what is here",
        )


def _share(kind: Kind, settings: RuntimeSettings) -> DeviceShare:
    return share_of(by_name(kind.mode.accelerator), kind.mode, kind.alloc_mode, settings.memory_limit)


def _sized(flags: Flags, kind: Kind, settings: RuntimeSettings) -> Flags:
    """The flags with the numbers that memory is computed from as numbers, and never more of a device than allowed."""
    share = _share(kind, settings)
    wanted = fraction(flags, "gpu-memory-utilization")
    most = share.utilization if wanted is None or settings.memory_limit else max(share.utilization, wanted)
    numbers = {name: whole_number(flags, name) for name in (*SIZED_BY, "max-num-batched-tokens")}
    return {
        **flags,
        **{name: value for name, value in numbers.items() if value is not None},
        "gpu-memory-utilization": min(wanted or most, most),
    }


def _fit(
    kind: Kind, settings: RuntimeSettings, model: ModelFacts, profile: Profile, flags: Flags, asked: Mapping[str, int]
) -> Fit:
    """The sum with the very flags that the engine gets. Raises Refused where it is more than the device has."""
    metadata = profile.metadata.model_copy(update={"gpu_count": flags.get("tensor-parallel-size", 1)})
    effective = profile.model_copy(update={"engine_args": flags, "metadata": metadata})
    reported = _share(kind, settings).reported_bytes
    request = sizing_request(effective, reported).model_copy(update={"concurrency": asked.get("max-num-seqs", 1)})
    if model.from_files and "quantization" not in flags:
        request = request.model_copy(update={"precision": None})  # what lies there is what is loaded
    answer = fit(model, reported, request)
    if isinstance(answer, DoesNotFit):
        where = f"{answer.precision} at {request.context} tokens on {request.tp} of {kind.label}"
        reason = f"{where}: short by {answer.shortfall_gib} GiB a device"
        raise does_not_fit(model, reason, _with_options(kind, model, request))
    return answer
