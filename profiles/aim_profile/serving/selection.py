"""Which profile serves a model on the devices at hand: AIM's rules, but true to partitions.

As in AIM (amd-enterprise-ai/aim-build@2be2cf8, src/aim_runtime/profile_selector.py): engine, metric, model, GPU,
GPU count and precision must match, profiles marked manual_selection_only are passed over, and what is left is
ordered by origin (custom, model, general), precision (fewest bits first) and type (optimized first). Where nothing
is left, GPU count, then precision, then engine are let go, and the answer says so.

Unlike AIM, a device is more than its PCI id: a partition matches profiles for its own mode only, and a whole GPU
none that are for a part. Derived profiles stand between the model's own and the general ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from aim_profile.errors import SizingError
from aim_profile.gpus.catalog import PartitionMode, by_name
from aim_profile.models.facts import ModelFacts, Precision
from aim_profile.nodes.facts import AllocMode

from .derive import Refusal, Wanted, derive
from .evidence import Measurement
from .files import read_file
from .profile import (
    TYPES,
    AimPrecision,
    Engine,
    Metric,
    Profile,
    ProfileError,
    devices_side_by_side,
    to_model_precision,
)

Origin = Literal["custom", "model", "derived", "general"]
Relaxed = Literal["GPU count", "precision", "engine"]

_ORIGINS: tuple[Origin, ...] = ("custom", "model", "derived", "general")
_RELAXATIONS: tuple[Relaxed, ...] = ("GPU count", "precision", "engine")
# profile_selector.py: fewer bits first.
_FEWEST_BITS: tuple[AimPrecision, ...] = ("int4", "int8", "fp4", "fp8", "fp16", "bf16", "fp32")
_QUANTISED: tuple[Precision, ...] = ("int4", "int8", "fp8")
_MOST_FILES = 10_000


class Devices(NamedTuple):
    """What a runtime would get: `number` devices of one card or node, all in one mode.

    mode.memory_mib is what the smallest of them reports: the catalogue's figure, or the node's own.
    """

    mode: PartitionMode
    number: int = 1
    alloc_mode: AllocMode = "CAPPING"

    @property
    def label(self) -> str:
        """`2 x MI300X CPX/NPS4`."""
        return f"{self.number} x {self.mode.accelerator} {self.mode.label}"


class Wish(NamedTuple):
    """What is asked for; None is AIM's `auto` (engine vllm, metric latency, precision: the fewest bits)."""

    engine: Engine | None = None
    metric: Metric | None = None
    precision: AimPrecision | None = None


class Candidate(NamedTuple):
    """A profile and where it is from; path is empty for a derived one."""

    profile: Profile
    origin: Origin
    path: str = ""


class Judged(NamedTuple):
    """A candidate and what became of it. refused: no such profile exists, and why; measured: it carries figures."""

    reference: str
    origin: Origin
    path: str
    verdict: Literal["chosen", "eligible", "lost", "refused"]
    reason: str
    measured: bool = False


class Selection(NamedTuple):
    """chosen is None where nothing matches; relaxed: what was let go to find it."""

    chosen: Profile | None
    relaxed: tuple[Relaxed, ...]
    judged: tuple[Judged, ...]


def select(
    model: ModelFacts,
    devices: Devices,
    wish: Wish | None = None,
    stored: Sequence[Candidate] = (),
    measurements: Sequence[Measurement] = (),
) -> Selection:
    """The best profile for `model` on `devices` among the stored and the derived ones, with every reason.

    measurements: profiles carry those that speak for them. The order stays AIM's: figures choose nothing.
    """
    wish = wish or Wish()
    derived, refused = _derived(model, devices, wish)
    found = [*stored, *derived]
    candidates = [item._replace(profile=item.profile.carrying(measurements)) for item in found]
    for steps in range(len(_RELAXATIONS) + 1):
        relaxed = _RELAXATIONS[:steps]
        lost = {id(c): reason for c in candidates if (reason := why_not(c.profile, model.id, devices, wish, relaxed))}
        eligible = sorted((c for c in candidates if id(c) not in lost), key=lambda c: _rank(c, wish))
        if eligible or steps == len(_RELAXATIONS):
            break
    chosen = eligible[0] if eligible else None
    judged = [*_ordered(eligible, wish), *(_judge(c, "lost", lost[id(c)]) for c in candidates if id(c) in lost)]
    # What had to be given up last is what mattered: a shorter list would have been tried before.
    return Selection(chosen.profile if chosen else None, relaxed if chosen else (), (*judged, *refused))


def why_not(
    profile: Profile, model_id: str, devices: Devices, wish: Wish, relaxed: Sequence[Relaxed] = ()
) -> str | None:
    """Why that profile may not be chosen; None if it may. Checks in AIM's order, partitions beside the GPU."""
    kept = profile.metadata
    engine, metric = wish.engine or "vllm", wish.metric or "latency"
    if kept.engine != engine and "engine" not in relaxed:
        return f"engine is {kept.engine}, asked for {engine}"
    if kept.metric != metric:
        return f"metric is {kept.metric}, asked for {metric}"
    if profile.aim_id not in (None, model_id):
        return f"is for {profile.aim_id}"
    if reason := wrong_device(profile, devices):
        return reason
    if kept.gpu_count > devices.number:
        return f"needs {_devices(kept.gpu_count)} side by side, there are {devices.number}"
    if kept.gpu_count != devices.number and "GPU count" not in relaxed:
        return f"is for {_devices(kept.gpu_count)}, there are {devices.number}"
    if wish.precision not in (None, kept.precision) and "precision" not in relaxed:
        return f"precision is {kept.precision}, asked for {wish.precision}"
    if kept.manual_selection_only:
        return f"is for manual selection only{_why_manual(profile)}"
    return None


def stored_profiles(folder: Path, model_id: str) -> tuple[Candidate, ...]:
    """Profiles for that model in a folder laid out as AIM's: `custom/`, `<org>/<model>/`, `general/`.

    A folder with none of these is taken whole, as custom. Raises ProfileError naming the file that is wrong.
    """
    if not folder.is_dir():
        raise ProfileError(f"{folder}: no such directory", field="profiles", value=str(folder))
    laid_out: dict[Origin, Path] = {
        "custom": folder / "custom",
        "model": folder.joinpath(*model_id.split("/")),
        "general": folder / "general",
    }
    if not any(place.is_dir() for place in laid_out.values()):
        laid_out = {"custom": folder}
    return tuple(
        Candidate(read_file(file), origin, str(file))
        for origin, place in laid_out.items()
        for file in _profile_files(place)
    )


def _profile_files(folder: Path) -> Iterator[Path]:
    found = sorted(file for file in folder.rglob("*") if file.suffix in (".yaml", ".yml", ".json"))
    if len(found) > _MOST_FILES:
        raise ProfileError(f"{folder}: {len(found)} files", field="profiles", remedy=f"at most {_MOST_FILES} are read")
    yield from found


def wrong_device(profile: Profile, devices: Devices) -> str | None:
    """Why that profile is not for these devices, whatever their number; None if it is."""
    mode, use = devices.mode, profile.partition
    if profile.metadata.gpu != mode.accelerator:
        return f"is for {profile.metadata.gpu}, this is {mode.accelerator}"
    wanted = use.label if use is not None else "SPX/NPS1"
    if use is None and mode.partitions > 1:
        return f"is for whole GPUs, this is a {mode.label} partition: {mode.memory_mib} MiB, {mode.cus} compute units"
    if wanted != mode.label:
        return f"is for {wanted}, this is {mode.label}"
    if use is None:
        return None
    if use.alloc_mode != devices.alloc_mode:
        return f"is for allocation mode {use.alloc_mode}, this is {devices.alloc_mode}"
    if use.device_memory_mib is not None and use.device_memory_mib > mode.memory_mib:
        return f"is for devices of {use.device_memory_mib} MiB, the smallest here has {mode.memory_mib}"
    return None


def _devices(count: int) -> str:
    return "1 device" if count == 1 else f"{count} devices"


def _why_manual(profile: Profile) -> str:
    return ": " + profile.evidence.weights if profile.evidence.weights == "needs a quantised checkpoint" else ""


def _rank(candidate: Candidate, wish: Wish) -> tuple[int, ...]:
    """Smaller is better. What loses bits while loading yields to weights that exist in that precision."""
    kept = candidate.profile.metadata
    return (
        _ORIGINS.index(candidate.origin),
        int(kept.precision != wish.precision) if wish.precision else 0,
        -kept.gpu_count,
        int(candidate.profile.evidence.weights == "quantised at load"),
        _FEWEST_BITS.index(kept.precision),
        TYPES.index(kept.type),
    )


def _ordered(eligible: Sequence[Candidate], wish: Wish) -> Iterator[Judged]:
    for place, candidate in enumerate(eligible):
        if place == 0:
            alone = len(eligible) == 1
            reason = "the only one that matches" if alone else "first by origin, device count, weights, precision, type"
            yield _judge(candidate, "chosen", reason)
        else:
            yield _judge(candidate, "eligible", _why_second(eligible[0], candidate, wish))


def _why_second(best: Candidate, other: Candidate, wish: Wish) -> str:
    ahead, behind = _rank(best, wish), _rank(other, wish)
    first = next((place for place, pair in enumerate(zip(ahead, behind, strict=True)) if pair[0] != pair[1]), None)
    names = (
        f"{best.origin} goes before {other.origin}",
        f"precision {wish.precision} was asked for",
        f"{_devices(best.profile.metadata.gpu_count)} go before {other.profile.metadata.gpu_count}",
        f"weights {best.profile.evidence.weights} go before weights {other.profile.evidence.weights}",
        f"{best.profile.metadata.precision} has fewer bits than {other.profile.metadata.precision}",
        f"{best.profile.metadata.type} goes before {other.profile.metadata.type}",
    )
    return "equal, and read later" if first is None else names[first]


def _judge(candidate: Candidate, verdict: Literal["chosen", "eligible", "lost"], reason: str) -> Judged:
    measured = candidate.profile.evidence.measured
    said = f"{reason}; measured" if measured else reason
    return Judged(candidate.profile.reference, candidate.origin, candidate.path, verdict, said, measured)


def _derived(model: ModelFacts, devices: Devices, wish: Wish) -> tuple[list[Candidate], list[Judged]]:
    """Every profile derived for that GPU, in this mode and the others, and every refusal in this mode."""
    if not model.sizable:
        return [], [Judged(model.id, "derived", "", "refused", model.status)]
    found: dict[str, Candidate] = {}
    refused: list[Judged] = []
    for mode, wanted in _derivable(model, devices, wish):
        made = _derive(model, mode, wanted)
        if not isinstance(made, Refusal):
            found.setdefault(made.reference, Candidate(made, "derived"))
        elif mode == devices.mode:
            refused.append(Judged(f"{model.id} {wanted.precision}", "derived", "", "refused", made.reason))
    return list(found.values()), list(dict.fromkeys(refused))


def _derivable(model: ModelFacts, devices: Devices, wish: Wish) -> Iterator[tuple[PartitionMode, Wanted]]:
    """In this mode every precision and device count; in the others the precision asked for, or the model's own."""
    accelerator = by_name(devices.mode.accelerator)
    metric = wish.metric or "latency"
    own = (to_model_precision(wish.precision) if wish.precision else None, _own_precision(model))
    precisions = tuple(dict.fromkeys((*_QUANTISED, *(precision for precision in own if precision))))
    counts = [n for n in devices_side_by_side(accelerator, devices.mode) if n <= devices.number]
    for precision in precisions:
        wanted = Wanted(precision=precision, metric=metric, alloc_mode=devices.alloc_mode)
        for count in (None, *counts):
            yield devices.mode, wanted.model_copy(update={"tensor_parallel": count})
    for mode in accelerator.modes(devices.mode.deployment):
        if mode.label != devices.mode.label:
            yield mode, Wanted(precision=own[0] or own[1], metric=metric)


def _own_precision(model: ModelFacts) -> Precision | None:
    found = model.native_precision
    return next((known for known in get_args(Precision) if known == found), None)


def _derive(model: ModelFacts, mode: PartitionMode, wanted: Wanted) -> Profile | Refusal:
    try:
        return derive(model, mode, wanted)
    except SizingError as problem:
        return Refusal(str(problem))
