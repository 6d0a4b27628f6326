"""From settings to an assignment: reads the node, the model's files and the profiles, and asks whether it fits."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from aim_kserve.errors import StartupError
from aim_profile.errors import AimProfileError
from aim_profile.models.facts import ModelFacts
from aim_profile.models.load import load_model
from aim_profile.nodes.cpu import read_cpu
from aim_profile.nodes.devices import refuse_larger
from aim_profile.nodes.facts import Node
from aim_profile.nodes.read import load_emulated, read_node
from aim_profile.plans.plan import load_plan
from aim_profile.serving.evidence_files import read_evidence
from aim_profile.serving.files import read_file
from aim_profile.serving.profile import Profile, ProfileId, parse_id
from aim_profile.serving.selection import Candidate, stored_profiles
from aim_runtime.assignment import ON_GPUS, Assignment, Case, Refused, assignments, check_filters, gpus, narrowed
from aim_runtime.cache import AIM_CACHE
from aim_runtime.choose import engine_of
from aim_runtime.settings import RuntimeSettings

_SERVED_NAME = re.compile(r"[^/\s]+(/[^/\s]+)*")
#: Kubernetes keeps so much of a container's last words (https://kubernetes.io/docs/tasks/debug/debug-application/
#: determine-reason-pod-failure/).
TERMINATION_LOG_BYTES = 4096
_MOST_OF_A_NAME = 400

_FILES = frozenset({".yaml", ".yml", ".json"})  # what says that a profile is a file's


def prepare(settings: RuntimeSettings, environment: Mapping[str, str] = os.environ) -> Assignment:
    """What the engine for ``settings`` is started with.

    Raises:
        StartupError: nothing to serve; a Refused says what does not fit or is not as the settings say.
    """
    (found,) = prepare_all([settings], None, environment)
    return found


def prepare_all(
    models: Sequence[RuntimeSettings],
    placement: Path | None,
    environment: Mapping[str, str] = os.environ,
    *,
    named: bool = False,
) -> list[Assignment]:
    """What the engines for several models are started with: an assignment per replica. Each of ``models`` is the
    settings of one, with its own name, directory and engine; ``placement``: the planner's file, where there is one;
    ``named``: refusals say which model they are of.

    Raises:
        StartupError: as above; or a plan of another node, of other models, or of modes that the node is not in.
    """
    try:
        node = here(models[0])
        cases = {settings.model_name: _case(settings, node, environment, named=named) for settings in models}
        in_pod = is_pod(models[0], environment)
        on_gpus = any(gpus(case.node) and case.engine in ON_GPUS for case in cases.values())
        notes = check_filters(environment, in_pod=in_pod) if on_gpus else ()
        plan = None if placement is None else load_plan(placement)
        found = assignments(cases, plan, node, node_name=models[0].node_name, notes=notes, named=named)
        return [_beside(environment, each) for each in found]
    except AimProfileError as error:
        raise Refused.because(error) from None


def _case(settings: RuntimeSettings, node: Node, environment: Mapping[str, str], *, named: bool) -> Case:
    """Raises StartupError: of that model, if it is one of several."""
    try:
        return _as_case(settings, node, environment)
    except AimProfileError as error:
        refused: StartupError = Refused.because(error)
    except OSError as error:  # a name that is too long, a link to nowhere, a folder that may not be read
        refused = _unreadable(error)
    except StartupError as error:
        refused = error
    if not named:
        raise refused
    who = f"model {settings.model_name}"
    raise refused.of(who) if isinstance(refused, Refused) else StartupError(f"{who}: {refused}")


def _unreadable(error: OSError) -> Refused:
    file = str(error.filename or "")
    what = file if len(file) <= _MOST_OF_A_NAME else f"{file[:_MOST_OF_A_NAME]}…"
    return Refused(
        f"{what}: {error.strerror or error}", field="model-dir", value=what, remedy="give one that can be read"
    )


def _as_case(settings: RuntimeSettings, node: Node, environment: Mapping[str, str]) -> Case:
    engine = engine_of(_for_profile(settings))
    model = facts_of(settings)
    settings, given = with_profile(settings, model)
    stored = _stored(settings, model)
    in_pod = is_pod(settings, environment)
    known = read_evidence(settings.evidence) if settings.evidence else None
    here = processors(node, engine, settings)
    return Case(settings, engine, here, model, given, stored, in_pod, evidence=known)


def _for_profile(settings: RuntimeSettings) -> RuntimeSettings:
    """The settings with the engine that the profile is for, where they leave it open. Raises AimProfileError."""
    said = settings.profile
    if said is None or settings.engine != "auto":
        return settings
    of_file = Path(said).suffix in _FILES
    engine = read_file(Path(said)).metadata.engine if of_file else parse_id(said.rpartition("/")[2]).engine
    return settings.model_copy(update={"engine": engine})


def _beside(environment: Mapping[str, str], assignment: Assignment) -> Assignment:
    """What is set in the environment already stays as somebody set it, and is said."""
    kept = {name for name, value in assignment.env.items() if environment.get(name, value) != value}
    if not kept:
        return assignment
    notes = [f"{name}={environment[name]} stays as it is set, the profile says {assignment.env[name]}" for name in kept]
    basis = assignment.evidence.model_copy(update={"notes": (*assignment.evidence.notes, *sorted(notes))})
    env = {name: value for name, value in assignment.env.items() if name not in kept}
    return assignment.model_copy(update={"env": env, "evidence": basis})


def located(settings: RuntimeSettings) -> RuntimeSettings:
    """The settings with the directory and the name that ``--model_id`` or ``--model_uri`` stand for, where they are not
    said.

    AIM's layouts: ``CACHE/org/model``, else the Hugging Face hub's own below ``CACHE/hub``. Nothing is downloaded,
    unless ``--fetch`` says so.

    Raises:
        Refused: the model is in neither, or its source is not in the cache.
    """
    if settings.model_uri is not None:
        settings = _from_cache(settings, settings.model_uri)
    said, name = settings.model_fields_set, settings.model_id
    update: dict[str, object] = {}
    if name is None:
        return settings
    if "model_name" not in said and _SERVED_NAME.fullmatch(name):
        update["model_name"] = name
    try:
        if "model_dir" not in said and not settings.model_dir.exists():
            update["model_dir"] = _directory_of(name, settings)
    except OSError as error:
        raise _unreadable(error) from None
    return settings.model_copy(update=update)


def _from_cache(settings: RuntimeSettings, uri: str) -> RuntimeSettings:
    from aim_runtime.cache import progress, use  # only who names a source has one
    from aim_runtime.cache.errors import CacheError, Missing

    root = settings.cache_path or AIM_CACHE
    fetch = settings.fetch and not settings.dry_run
    try:
        found = use.fetched(root, uri, progress.Lines()) if fetch else use.cached(root, uri)
    except CacheError as error:
        remedy = "or start with --fetch" if isinstance(error, Missing) else ""
        raise Refused(str(error), field="model-uri", value=uri, remedy=remedy) from None
    except OSError as error:
        raise _unreadable(error) from None
    return settings.model_copy(update={"model_dir": found})


def hold(settings: RuntimeSettings) -> str | None:
    """Keep a model of a cache from being pruned while this process lives. Returns what it is, if it is one.

    Raises:
        Refused: it is being removed, or is damaged.
    """
    place = settings.model_dir
    if ".aim-cache" not in place.resolve().parts:
        return None
    from aim_runtime.cache import use
    from aim_runtime.cache.errors import CacheError

    try:
        entry = use.hold(place)
    except CacheError as error:
        raise Refused(str(error), field="model-dir", value=str(place), remedy="") from None
    except OSError as error:
        raise _unreadable(error) from None
    return None if entry is None else f"{entry.source} {entry.revision}".strip()


def _directory_of(name: str, settings: RuntimeSettings) -> Path:
    if Path(name).is_absolute() and Path(name).is_dir():
        return Path(name)
    cache = settings.cache_path or AIM_CACHE
    direct = cache / (settings.custom_model_name or name)
    if direct.is_dir():
        return direct
    # https://huggingface.co/docs/huggingface_hub/guides/manage-cache: refs/main names the snapshot that is current.
    hub = cache / "hub" / f"models--{name.replace('/', '--')}"
    with contextlib.suppress(OSError, UnicodeDecodeError):
        snapshot = hub / "snapshots" / (hub / "refs" / "main").read_text(encoding="utf-8").strip()
        if snapshot.is_dir():
            return snapshot
    raise Refused(
        f"model {name}: neither {direct} nor {hub} is here, and {settings.model_dir} is not either",
        field="model-id",
        value=name,
        remedy="nothing is downloaded at start: give a storageUri, --model_dir, or --cache_path that holds it",
    )


def here(settings: RuntimeSettings) -> Node:
    """This machine, or the one of ``--node``. Raises NodeError."""
    return read_node() if settings.node is None else load_emulated(settings.node)


def check_machine(settings: RuntimeSettings) -> None:
    """``--node`` may describe less than this machine, so that a model gets a part of it; not another machine.

    Raises:
        Refused: it has GPUs, or CPU sets that are not here.
    """
    if settings.node is None:
        return
    try:
        node = load_emulated(settings.node)
        if gpus(node):
            raise Refused(
                f"--node {settings.node} describes GPUs: they are only bound where they are read",
                field="node",
                value=str(settings.node),
                remedy="leave it out to serve, or ask with --dry_run",
            )
        refuse_larger(node, read_node())
    except AimProfileError as error:
        raise Refused.because(error) from None


def is_pod(settings: RuntimeSettings, environment: Mapping[str, str]) -> bool:
    """Whether a device plugin has chosen the devices: the kubelet sets the variable in every container."""
    if settings.binding != "auto":
        return settings.binding == "pod"
    return settings.node is None and bool(environment.get("KUBERNETES_SERVICE_HOST"))


def processors(node: Node, engine: str, settings: RuntimeSettings) -> Node:
    """The node with this machine's processors in the place of its GPUs, for an engine that computes on them."""
    if engine in ON_GPUS or not gpus(node) or settings.node is not None:
        return node
    card = read_cpu(Path("/"))
    return node.model_copy(update={"cards": () if card is None else (card,), "backend": "proc"})


def facts_of(settings: RuntimeSettings) -> ModelFacts:
    """What is known of the model's files; where they cannot be read, their size, and why (the engine may know more)."""
    place = settings.model_dir
    try:
        model = load_model(place)
    except AimProfileError as error:
        files = [place] if place.is_file() else [*place.glob("*.gguf"), *place.glob("*.safetensors")]
        model = ModelFacts(
            id=str(place),
            architecture="unknown",
            file_bytes=sum(file.stat().st_size for file in files),
            source=str(place),
            confidence="unverified",
            missing=(str(error),),
        )
    return model if settings.model_id is None else model.model_copy(update={"id": settings.model_id})


def with_profile(settings: RuntimeSettings, model: ModelFacts) -> tuple[RuntimeSettings, Profile | None]:
    """The settings with what ``--profile`` says, and the profile where it is a file's.

    An id says mode, precision, device count and metric; the rest is derived for this very model.

    Raises:
        AimProfileError: no such profile, or no such id.
        Refused: the id contradicts another setting.
    """
    said = settings.profile
    if said is None:
        return settings, None
    if Path(said).suffix in _FILES:
        return settings, read_file(Path(said))
    name = said.rpartition("/")[2]
    for candidate in _stored(settings, model):
        if candidate.profile.id == name:
            return settings, candidate.profile
    return _narrowed(settings, said, parse_id(name)), None


def _narrowed(settings: RuntimeSettings, said: str, parts: ProfileId) -> RuntimeSettings:
    compute, _, memory = (parts.partition or "SPX/NPS1").partition("/")
    wanted = {
        "compute_partition": compute,
        "memory_partition": memory,
        "gpu_model": parts.gpu,
        "precision": parts.precision,
        "metric": parts.metric,
        "partition_count": parts.gpu_count,
    }
    return narrowed(settings, f"profile {said}", wanted)


def _stored(settings: RuntimeSettings, model: ModelFacts) -> Sequence[Candidate]:
    if settings.profiles is None:
        return ()
    found = stored_profiles(settings.profiles, model.id)
    return [item for item in found if settings.allow_general_profile_fallback or item.origin != "general"]


def described(assignment: Assignment) -> Iterator[str]:
    """An assignment in lines for people."""
    what = [word for word in (assignment.evidence.gpu, assignment.evidence.mode) if word]
    on = ", ".join(f"card {device.card} partition {device.partition}" for device in assignment.devices)
    kind = f" ({' '.join(what)})" if what else ""
    yield f"model {assignment.model}: {assignment.engine} on {on or 'this machine'}{kind}"
    if assignment.profile:
        yield f"profile: {assignment.profile}"
    if assignment.fit:
        yield _memory(assignment.fit)
    for note in assignment.evidence.notes:
        yield f"note: {note}"


def _memory(fit: Mapping[str, Any]) -> str:
    """On CPUs ``pool_gib`` is the cache that all requests share, ``kv_gib`` one sequence's."""
    cache = fit.get("pool_gib", fit["kv_gib"])
    spare = round(fit["headroom_gib"] + fit["kv_gib"] - cache, 3)
    return (
        f"memory of each device: {fit['weights_gib']} GiB of weights, {fit['overhead_gib']} of overhead, "
        f"{cache} of cache; {spare} of {fit['budget_gib']} GiB to spare"
    )


def refuse(settings: RuntimeSettings, error: StartupError, *, of_several: bool = False) -> int:
    """Say why, where people and Kubernetes look; returns the exit code. of_several: a line for each model."""
    reason = str(error)
    say(
        reason if of_several else reason.replace("\n", "\\n"),
        settings.termination_log,
        create="termination_log" in settings.model_fields_set,
    )
    return 1


def say(reason: str, termination_log: Path, *, create: bool) -> None:
    """A line for each of ``reason``, on stderr and in the termination log, where there is one or it may be created."""
    lines = [_printable(line) for line in reason.splitlines()]
    for line in lines:
        print(f"error: {line}", file=sys.stderr)  # noqa: T201  what a person or kubectl logs reads
    with contextlib.suppress(OSError):
        if create or termination_log.exists():
            text = "\n".join(lines).encode("utf-8", "replace")[:TERMINATION_LOG_BYTES]
            termination_log.write_bytes(text.decode("utf-8", "ignore").encode())


def _printable(line: str) -> str:
    """Names of files may hold anything: a terminal must not take it for orders."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in line)
