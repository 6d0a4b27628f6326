"""What a server's process will meet: device files it may open, shared memory, variables that hide devices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from aim_profile.nodes.facts import Node
from aim_profile.units import GIB, MIB

from .finding import Finding, error, ok, unknown, warning
from .system import System

# AMD's KServe guide mounts 8 GiB; a container has 64 MiB where nothing is mounted.
_SHM_GIB = 8
_HSA, _HIP, _CUDA = "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"
_FILTERS = (_HSA, _HIP, _CUDA, "GPU_DEVICE_ORDINAL")
_GFX = "HSA_OVERRIDE_GFX_VERSION"


def device_files(system: System, node: Node) -> Iterator[Finding]:
    """May /dev/kfd and each device's /dev/dri/renderD* be read and written?"""
    check = "device files"
    if not system.has("dev"):
        yield unknown(check, "not in what was read", "/dev", "run it on the node itself")
        return
    if not any(not card.is_cpu for card in node.cards):
        return
    minors = [part.render_minor for card in node.cards for part in card.partitions if not card.is_cpu]
    names = ["dev/kfd", *(f"dev/dri/renderD{minor}" for minor in minors if minor is not None)]
    wrong = [found for name in names if (found := _device_file(system, name)) is not None]
    yield from wrong
    if None in minors or not minors:
        seen = f"{minors.count(None) or 'all'} devices have no known render node"
        yield unknown(check, seen, "/dev/dri", "record /sys/class/kfd/kfd/topology/nodes as well")
    elif not wrong:
        yield ok(check, f"/dev/kfd and {len(names) - 1} render nodes may be used", "/dev")


def _device_file(system: System, name: str) -> Finding | None:
    usable = system.usable(name)
    if usable is None:
        remedy = "in a pod: ask for the device plugin's resource; on the host: read `dmesg | grep -e amdgpu -e kfd`"
        return error("device files", f"/{name} is not there", f"/{name}", remedy)
    if not usable:
        remedy = f"add the user to the groups `render` and `video`, or to that of `stat -c %G /{name}`"
        return error("device files", f"/{name} may not be read and written", f"/{name}", remedy)
    return None


def shared_memory(system: System) -> Finding:
    """Is /dev/shm large enough for tensor parallelism?"""
    check, where = "shared memory", "/dev/shm"
    size = None if system.root is None else system.size_bytes("dev/shm")
    if size is None:
        return unknown(check, "its size is not readable", where, "run it in the pod, or record /proc/mounts")
    shown = f"{size / GIB:.1f} GiB" if size >= GIB else f"{size // MIB} MiB"
    if size < _SHM_GIB * GIB:
        remedy = f"mount an emptyDir of `medium: Memory` and {_SHM_GIB}Gi at /dev/shm, or `--shm-size {_SHM_GIB}g`"
        return warning(check, f"{shown}: tensor parallelism (RCCL) may fail for want of it", where, remedy)
    return ok(check, shown, where)


def variables(system: System, devices: int) -> Iterator[Finding]:
    """The variables that hide devices, against each other and against the devices there are."""
    check = "variables"
    if system.environment is None:
        remedy = "run it where the server runs"
        yield unknown(check, "another machine's environment", "the process's environment", remedy)
        return
    given = {name: system.environment[name] for name in _FILTERS if name in system.environment}
    found = [*_against_each_other(given), *_out_of_range(given, devices)]
    if given and "KUBERNETES_SERVICE_HOST" in system.environment:
        remedy = "leave it out: the device plugin gives a pod its own devices, numbered from 0"
        found.append(warning(check, f"{', '.join(given)} set in a pod", ", ".join(given), remedy))
    if _GFX in system.environment:
        remedy = "leave it out: it is for GPUs that ROCm has no code for"
        found.append(warning(check, f"{_GFX} is set: kernels of another GPU are run", _GFX, remedy))
    yield from found
    if not found:
        seen = f"{', '.join(given)}: no contradiction" if given else "nothing hides a device"
        yield ok(check, seen, ", ".join(given or _FILTERS))


def _against_each_other(given: Mapping[str, str]) -> Iterator[Finding]:
    if _HIP in given and _CUDA in given and given[_HIP] != given[_CUDA]:
        remedy = f"set one of them; on ROCm {_HSA} alone is best"
        yield error("variables", f"{_HIP} and {_CUDA} differ: vLLM refuses to start", f"{_HIP}, {_CUDA}", remedy)
    seen_by_hip = _numbers(given.get(_HSA, ""))
    for name in (_HIP, _CUDA):
        wanted = _numbers(given.get(name, ""))
        if wanted and seen_by_hip and max(wanted) >= len(seen_by_hip):
            seen = f"{name} asks for device {max(wanted)}, but {_HSA} leaves {len(seen_by_hip)}, numbered from 0"
            yield error("variables", seen, f"{_HSA}, {name}", f"leave {name} out, or number what {_HSA} leaves")


def _out_of_range(given: Mapping[str, str], devices: int) -> Iterator[Finding]:
    for name, text in given.items():
        wanted = _numbers(text)
        if not text.strip():
            yield warning("variables", f"{name} is set to nothing: it may hide every device", name, "unset it")
        elif wanted and devices and max(wanted) >= devices and not (name != _HSA and _HSA in given):
            remedy = f"number the devices from 0 to {devices - 1}"
            yield error("variables", f"{name} asks for device {max(wanted)} of {devices}", name, remedy)


def _numbers(text: str) -> list[int]:
    """`0,2` as numbers; [] where it is anything else, as UUIDs are."""
    words = [word.strip() for word in text.split(",")]
    return [int(word) for word in words] if all(word.isdecimal() and len(word) < 5 for word in words) else []
