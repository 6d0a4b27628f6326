"""A model on the processors of a machine: which CPU set, how much cache, how many threads.

The embedded engine shares one cache among all its requests, and vLLM's CPU build takes as much as it is told. Both get
what the settings ask for, or as much of it as the memory holds, but at least one sequence; where not even that fits,
the start is refused.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from aim_profile.errors import AimProfileError
from aim_profile.models.facts import ModelFacts
from aim_profile.nodes import devices as nodes
from aim_profile.serving.profile import to_model_precision
from aim_profile.sizing.fit import DEFAULT_UTILIZATION, DoesNotFit, Fit, default_context
from aim_profile.sizing.on_device import size_on_device
from aim_profile.units import GIB, MIB, gib

from .arguments import Flags, agreed, named, whole_number
from .devices import gpus
from .facts import Assignment, Basis, Case, Device, Refused, does_not_fit, notes_of

#: Cache where nobody says how long and how many: the embedded engine's own, and what vLLM's CPU build took by default.
POOL_BYTES = {"llama_cpp": 512 * MIB, "vllm": 4 * GIB}
SLOTS = {"llama_cpp": 8, "vllm": 16}
MOST_SLOTS = 256  # llama.cpp's LLAMA_MAX_SEQ
#: Of a process that has imported an engine. OpenBLAS, which numpy brings, waits for ever where it gets no memory.
LEAST_BYTES = 96 * MIB
_OF_GPUS = ("compute_partition", "memory_partition", "gpu_sharing", "gpu_model", "card", "profile", "evidence")
_KV_FLAG = "kv-cache-memory-bytes"
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class _Wanted(NamedTuple):
    """context, concurrency: None where nobody says. doubled: served in 32 bits, weights and cache."""

    user: Flags
    context: int | None
    concurrency: int | None
    doubled: bool


def assign_cpus(case: Case) -> Assignment:
    """The CPU set that the settings name, or the first that is free, with the cache that fits there.

    Raises:
        Refused: the settings ask for a GPU, there is no such set, or the model does not fit.
    """
    _check_settings(case)
    device, wanted = _device(case), _wanted(case)
    if device is None or not device.memory_bytes or not case.model.sizable:
        return _unsized(case, device, wanted)
    model = _as_served(case.model, doubled=wanted.doubled)
    try:
        answer = _size(case, model, device, wanted)
    except AimProfileError as error:
        raise Refused.because(error) from None
    pool, note = _pool(case, device, wanted, answer)
    flags = {**wanted.user, "max-model-len": answer.context, **_of_engine(case, device, wanted, pool)}
    fit = answer.model_dump(mode="json", exclude={"alternatives"})
    return _assigned(case, device, flags, (note, *answer.notes)).model_copy(
        update={"fit": {**fit, "pool_gib": gib(pool)}}
    )


def _check_settings(case: Case) -> None:
    settings = case.settings
    for name in _OF_GPUS:
        if (value := getattr(settings, name)) is not None:
            field = name.replace("_", "-")
            why = f"the {case.engine} engine computes on the CPU" if gpus(case.node) else "no AMD GPU is here"
            raise Refused(f"{field} {value}: {why}", field=field, value=value, remedy="leave it out")
    if case.engine == "llama_cpp" and (settings.max_concurrency or 0) > MOST_SLOTS:
        raise Refused(
            f"max-concurrency {settings.max_concurrency}: llama.cpp computes at most {MOST_SLOTS} sequences at once",
            field="max-concurrency",
            value=settings.max_concurrency,
            remedy=f"give at most {MOST_SLOTS}: more requests wait",
        )
    if settings.partition_count not in (None, 1):
        raise Refused(
            f"partition-count {settings.partition_count}: a model runs on one CPU set",
            field="partition-count",
            value=settings.partition_count,
            remedy="leave it out, or give the set more cores and memory",
        )


def _device(case: Case) -> nodes.Device | None:
    """None where the machine's processors were not read."""
    wanted = case.settings.partition_id
    here = [device for device in nodes.devices_of(case.node) if device.kind == "cpu"]
    free = [device for device in here if case.may_have((device.card, device.partition))]
    found = next((device for device in free if wanted in (None, device.partition)), None)
    if found is not None or not (here or wanted):
        return found
    numbers = ", ".join(str(device.partition) for device in free) or "none"
    if wanted is None:
        taken = "the only one" if len(here) == 1 else f"each of the {len(here)}"
        raise Refused(
            f"no CPU set is left for it: {taken} here is taken",
            field="devices",
            value=len(here),
            remedy="describe more sets (--node), load it on demand, or serve less",
        )
    raise Refused(
        f"partition-id {wanted}: the CPU sets that are free here are {numbers}",
        field="partition-id",
        value=wanted,
        remedy="name one of them, or leave it out",
    )


def _wanted(case: Case) -> _Wanted:
    user = named(case.settings.engine_options(case.engine).get("engine_args", ()))
    if case.engine == "vllm" and case.settings.precision == "fp32":
        user = {"dtype": "float32", **user}
    asked = agreed(case.settings, case.engine, user)
    doubled = case.engine == "vllm" and user.get("dtype") in ("float32", "float")
    return _Wanted(user, asked.get("max-model-len"), asked.get("max-num-seqs"), doubled)


def _as_served(model: ModelFacts, *, doubled: bool) -> ModelFacts:
    """Files of 16 bits served in 32 take twice their size."""
    if not doubled or model.native_precision not in ("bf16", "fp16"):
        return model
    sizes = {"file_bytes": model.file_bytes, "native_bytes": model.native_bytes}
    return model.model_copy(update={name: size and 2 * size for name, size in sizes.items()})


def _size(case: Case, model: ModelFacts, device: nodes.Device, wanted: _Wanted) -> Fit:
    """One sequence: as long as asked for; else as the model was made for where the usual cache holds it, or 8192."""
    context = wanted.context or default_context(model)
    answer = _one_sequence(case, model, device, context, doubled=wanted.doubled)
    longest = model.max_positions or context
    if wanted.context is None and longest * answer.kv_bytes_per_token <= POOL_BYTES[case.engine]:
        longer = _one_sequence(case, model, device, longest, doubled=wanted.doubled)
        answer = longer if isinstance(longer, Fit) else answer
    if isinstance(answer, DoesNotFit):
        memory = case.settings.memory_limit or device.memory_bytes or 0
        where = f"{answer.precision} at {answer.context} tokens in {gib(memory)} GiB of memory"
        raise does_not_fit(model, f"{where}: short by {answer.shortfall_gib} GiB", answer)
    return answer


def _one_sequence(
    case: Case, model: ModelFacts, device: nodes.Device, context: int, *, doubled: bool
) -> Fit | DoesNotFit:
    settings = case.settings
    precision = to_model_precision(settings.precision) if settings.precision else None
    engine = "llama_cpp" if case.engine == "llama_cpp" else "vllm"
    answer = size_on_device(
        model,
        device,
        engine=engine,  # type: ignore[arg-type]  # a Literal of the two
        precision=precision,
        context=context,
        concurrency=2 if doubled else 1,  # a cache in 32 bits is two in 16
        metric=settings.metric or "latency",
        memory_limit_bytes=settings.memory_limit,
    )
    if not doubled:
        return answer
    twice = {"kv_bytes_per_token": 2 * answer.kv_bytes_per_token, "max_concurrency": answer.max_concurrency // 2}
    return answer.model_copy(update={"concurrency": 1, **twice})


def _pool(case: Case, device: nodes.Device, wanted: _Wanted, answer: Fit) -> tuple[int, str]:
    """Bytes of cache for all requests together, and a note where that is less than asked for.

    Raises Refused for a cache given by name that does not fit.
    """
    room = int((answer.headroom_gib + answer.kv_gib) * GIB)
    sequence = answer.context * answer.kv_bytes_per_token
    slots = wanted.concurrency or SLOTS[case.engine]
    given = _given_pool(wanted.user)
    if given is not None and given > room:
        left = f"{gib(room)} of {gib(device.memory_bytes or 0)} GiB are left beside weights and runtime"
        raise Refused(
            f"{_KV_FLAG} {gib(given)} GiB: {left}",
            field=_KV_FLAG,
            value=given,
            remedy=f"give at most {room // MIB}M",
            shortfall_gib=gib(given - room),
        )
    if given is not None:
        return given, ""
    all_said = wanted.context is not None and wanted.concurrency is not None
    most = slots * sequence if all_said else max(POOL_BYTES[case.engine], sequence)
    pool = min(slots * sequence, most, max(room, sequence))
    short = all_said and pool < slots * sequence
    return pool, f"{pool // sequence} of {slots} sequences of full length fit at once, others wait" if short else ""


def _given_pool(user: Flags) -> int | None:
    """``--kv-cache-memory-bytes`` as vLLM reads it: 1G is 2^30, 1g is 10^9. None where it is not given."""
    value = user.get(_KV_FLAG)
    if value is None:
        return None
    found = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?)([kKmMgGtT]?)", str(value).strip())
    if found is None:
        raise Refused(
            f"engine_args: {_KV_FLAG} is {value!r}", field=_KV_FLAG, value=str(value), remedy="write it as in 2G"
        )
    return int(float(found[1]) * _UNITS[found[2]])


def _of_engine(case: Case, device: nodes.Device | None, wanted: _Wanted, pool: int | None) -> Flags:
    """The engine's own flags that follow from the CPU set."""
    cache: Flags = {} if pool is None else {_KV_FLAG: pool}
    if case.engine == "vllm":
        said = {} if wanted.concurrency is None else {"max-num-seqs": wanted.concurrency}
        return {**said, **cache}
    threads = case.settings.engine_options(case.engine).get("threads") or (device and device.compute_units)
    of_set: Flags = {"threads": threads} if threads else {}
    return {"max-concurrency": wanted.concurrency or SLOTS["llama_cpp"], **of_set, **cache}


def _unsized(case: Case, device: nodes.Device | None, wanted: _Wanted) -> Assignment:
    """What cannot be sized is started, but not where its file and its process alone are more than the memory. Raises
    Refused."""
    memory = case.settings.memory_limit or (device.memory_bytes if device else None)
    held = case.model.file_bytes or 0
    if memory and held + LEAST_BYTES > memory * DEFAULT_UTILIZATION:
        short = gib(held + LEAST_BYTES - memory * DEFAULT_UTILIZATION)
        where = f"{gib(held)} GiB of weights, and its process, in {gib(memory)} GiB of memory"
        raise Refused(
            f"{case.model.id} does not fit: {where}: short by {short} GiB",
            field="model",
            value=case.model.id,
            remedy="give it more memory",
            shortfall_gib=short,
        )
    flags = {**wanted.user, **_of_engine(case, device, wanted, None)}
    if wanted.context is not None:
        flags["max-model-len"] = wanted.context
    why = case.model.status if device else "this machine's memory was not read"
    return _assigned(case, device, flags, (f"not sized: {why}",))


def _assigned(case: Case, device: nodes.Device | None, flags: Flags, notes: tuple[str, ...]) -> Assignment:
    """A CPU set that is one of several, or that a file describes, is kept to: its cores, threads and memory."""
    kept_to = device is not None and (case.node.backend == "emulated" or device.partition > 0)
    cpus = device.cpus if device and kept_to else ()
    limit = case.settings.memory_limit
    return Assignment(
        engine=case.engine,
        model=case.settings.model_name,
        model_dir=case.settings.model_dir,
        devices=(_as_assigned(device),) if device else (),
        engine_args=flags,
        env=_environment(case.engine, cpus, whole_number(flags, "threads")),
        cpus=cpus or None,
        memory_bytes=limit or (device.memory_bytes if device and kept_to else None),
        evidence=Basis(node=case.node.backend, mode="CPU", notes=notes_of(notes)),
    )


def _as_assigned(device: nodes.Device) -> Device:
    return Device(
        card=device.card,
        partition=device.partition,
        memory_mib=device.memory_mib,
        compute_units=device.compute_units,
    )


def _environment(engine: str, cpus: tuple[int, ...], threads: int | None) -> dict[str, str]:
    """OpenMP's threads, one a core; vLLM's workers bind theirs themselves, and leave one core out unless told."""
    if not cpus:
        return {}
    bound = {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cpus))} if engine == "vllm" else {}
    return {"OMP_NUM_THREADS": str(threads or len(cpus)), **bound}
