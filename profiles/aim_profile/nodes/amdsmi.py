"""amd-smi's JSON as cards: saved files of any release, the amdsmi library where the image carries it, or the tool.

Shapes (amd-smi CLI source): releases up to 6.x print bare lists; 7.x wraps `static` in {"gpu_data": []};
`partition` prints {"current_partition": []}, with -m {"memory_partition": []} and, with -a,
{"partition_profiles": []}, in which continuation rows have empty identity fields and the current profile ends in
`*`. 6.3 prints a list for each, one behind the other. `N/A` is a blank. Warnings may stand before and between.

Importing the library without libamd_smi.so prints to the console and raises KeyError; its calls raise its own
exception classes, which differ by release. No other file imports it.
"""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

from aim_profile.errors import NodeError
from aim_profile.gpus.catalog import COMPUTE_MODES, MEMORY_MODES, Compute, Memory

from .facts import AllocMode, Backend, Card
from .rows import Row, cards_from_rows
from .spoken import documents, notes_of

_MAX_FILE_BYTES = 64 * 2**20
_WRAPPERS = ("gpu_data", "current_partition", "memory_partition", "partition_profiles")
_IGNORED = ("partition_resources", "cpu_data")
_COMMANDS = (("list",), ("static",), ("metric", "--mem-usage"), ("partition",))
_COMMAND_TIMEOUT_S = 30
_BLANK = (None, "", "N/A")
_COMPUTE_KEYS = ("compute_partition", "accelerator_partition")
_MEMORY_KEYS = ("memory", "current_memory_partition")


def read_amd_smi_files(files: Sequence[Path], notes: list[str] | None = None) -> tuple[Card, ...]:
    """Cards from one or several saved outputs of one node; what else amd-smi said is added to `notes`.

    Raises NodeError naming file and key.
    """
    said: list[str] = []
    cards = cards_from_rows(_joined((_load(file, said), str(file)) for file in files))
    if notes is not None:
        notes += dict.fromkeys(said)
    return cards


def ask_amdsmi(notes: list[str] | None = None) -> tuple[Backend, tuple[Card, ...]]:
    """The live node by the amdsmi library, else by the amd-smi tool; no cards where neither answers.

    What the tool said beside its JSON is added to `notes`.
    """
    if rows := library_rows():
        return "amdsmi", cards_from_rows({row.gpu: row for row in rows})
    said: list[str] = []
    cards = cards_from_rows(_joined((_run(command, said), f"amd-smi {' '.join(command)}") for command in _COMMANDS))
    if notes is not None:
        notes += dict.fromkeys(said)
    return "amd-smi", cards


def _joined(outputs: Iterable[tuple[list[Any], str]]) -> dict[int, Row]:
    """What all outputs say of each device; earlier ones go first."""
    rows: dict[int, Row] = {}
    for found, named in outputs:
        for row in (row for document in found for row in _rows(document, named)):
            rows[row.gpu] = rows[row.gpu].joined(row) if row.gpu in rows else row
    return rows


def _run(command: Sequence[str], said: list[str]) -> list[Any]:
    """The tool's answers, [] where it is absent, fails or prints no JSON: then there is nothing to read."""
    try:
        done = subprocess.run(
            ["amd-smi", *command, "--json"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_COMMAND_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    try:
        found, other = documents(done.stdout)
    except (ValueError, RecursionError):
        found, other = [], done.stdout.splitlines()
    said += notes_of(other, "amd-smi")
    return found


def _load(file: Path, said: list[str]) -> list[Any]:
    try:
        if file.stat().st_size > _MAX_FILE_BYTES:
            raise _bad(str(file), "larger than any amd-smi output")
        found, other = documents(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        raise _bad(str(file), f"not readable as JSON: {problem}") from problem
    said += notes_of(other, str(file))
    return found


def _rows(raw: Any, named: str) -> Iterable[Row]:
    """Rows of any shape, continuation rows folded into the row they continue."""
    if isinstance(raw, list):
        return [row for row in (_plain_row(entry, named) for entry in raw) if row]
    if not isinstance(raw, dict) or not (set(raw) & {*_WRAPPERS, *_IGNORED}):
        raise _bad(named, f"neither a list nor an object with one of {', '.join(_WRAPPERS)}")
    found: list[Row] = []
    for key in _WRAPPERS:
        entries = raw.get(key, [])
        if not isinstance(entries, list):
            raise _bad(named, f"{key} must be a list")
        if key == "partition_profiles":
            found += _profile_rows(entries, named)
        else:
            found += [row for row in (_plain_row(entry, named) for entry in entries) if row]
    return found


def _plain_row(entry: Any, named: str) -> Row | None:
    """One GPU of list, static, metric or the current partition; None for a continuation row."""
    _must_be_object(entry, named)
    gpu = _gpu(entry, named)
    if gpu is None:
        return None
    partition = _section(entry, "partition", named)
    asic, bus = _section(entry, "asic", named), _section(entry, "bus", named)
    # Of 6.3; its `caps` are those of the current compute mode, so they bind nothing.
    memory = _section(entry, "memory_partition", named)
    return Row(
        gpu=gpu,
        bdf=_bdf(_first(entry, "bdf") or _first(bus, "bdf"), named),
        uuid=_text(_first(entry, "uuid")),
        device_id=_device_id(_first(asic, "device_id"), named),
        market_name=_text(_first(asic, "market_name")),
        compute_units=_number(_first(asic, "num_compute_units"), named),
        gfx=_text(_first(asic, "target_graphics_version")),
        numa_node=_number(_first(_section(entry, "numa", named), "node"), named),
        kfd_node=_number(_first(entry, "node_id"), named),
        partition_id=_partition_id(_either(partition, ("partition_id",), entry, "partition_id"), named),
        compute=_mode(_either(partition, _COMPUTE_KEYS, entry, "accelerator_type"), COMPUTE_MODES, named),
        memory=_mode(
            _first(partition, "memory_partition") or _first(entry, *_MEMORY_KEYS) or _first(memory, "current"),
            MEMORY_MODES,
            named,
        ),
        caps_memory=_memory_caps(entry, named) if "current_memory_partition" in entry else (),
        alloc_mode=_mode(_first(partition, "compute_partition_mem_alloc_mode"), get_args(AllocMode), named),
        memory_mib=_vram_mib(entry, named),
    )


def _vram_mib(entry: dict[str, Any], named: str) -> int | None:
    usage = _first(_section(entry, "mem_usage", named), "total_vram")
    size = usage if usage is not None else _first(_section(entry, "vram", named), "size")
    if isinstance(size, dict):
        if size.get("unit") not in ("MB", "MiB"):  # amd-smi writes MB and means MiB
            raise _bad(named, f"memory unit {size.get('unit')!r} is not MB")
        size = size.get("value")
    return None if size in _BLANK else _number(size, named)


def _profile_rows(entries: list[Any], named: str) -> list[Row]:
    """Accelerator profiles: caps of each GPU, its current compute mode, XCDs per partition."""
    rows: dict[int, Row] = {}
    gpu: int | None = None
    for entry in entries:
        _must_be_object(entry, named)
        gpu = _gpu(entry, named) if entry.get("gpu_id") not in _BLANK else gpu
        name = _text(_first(entry, "accelerator_type"))
        if gpu is None:
            raise _bad(named, "the first profile row has no gpu_id")
        rows.setdefault(gpu, Row(gpu=gpu, needs_root=name is None))
        if name is None:
            continue
        compute: Compute | None = _mode(name.rstrip("* "), COMPUTE_MODES, named)
        memory = _memory_caps(entry, named)
        rows[gpu] = rows[gpu].with_profile(
            compute, memory, name.rstrip().endswith("*"), _number(_first(entry, "partition_id"), named, lenient=True)
        )
    return list(rows.values())


def _memory_caps(entry: dict[str, Any], named: str) -> tuple[Memory, ...]:
    text = _text(_first(entry, "memory_partition_caps"))
    if text is None:
        return ()
    modes = [_mode(word.strip(), MEMORY_MODES, named) for word in text.split(",") if word.strip()]
    return tuple(mode for mode in modes if mode is not None)


def _must_be_object(entry: Any, named: str) -> None:
    if not isinstance(entry, dict):
        raise _bad(named, f"a row is {type(entry).__name__}, not an object")


def _section(entry: dict[str, Any], key: str, named: str) -> dict[str, Any]:
    found = entry.get(key)
    if found in _BLANK:
        return {}
    if not isinstance(found, dict):
        raise _bad(named, f"{key} is {found!r:.60}, not an object")
    return found


def _first(entry: dict[str, Any], *keys: str) -> Any:
    """The first of those keys that is not blank; 0 is a value."""
    return next((entry[key] for key in keys if entry.get(key) not in _BLANK), None)


def _either(section: dict[str, Any], keys: tuple[str, ...], entry: dict[str, Any], key: str) -> Any:
    """The section's value under any of `keys`, else the entry's own under `key`."""
    found = _first(section, *keys)
    return _first(entry, key) if found is None else found


def _gpu(entry: dict[str, Any], named: str) -> int | None:
    for key in ("gpu", "gpu_id"):
        if entry.get(key) not in _BLANK:
            return _number(entry[key], named)
    if "gpu" in entry or "gpu_id" in entry:
        return None
    raise _bad(named, "a row has neither gpu nor gpu_id")


def _number(value: Any, named: str, *, lenient: bool = False) -> int | None:
    """A whole number, also as text. lenient: anything else is blank (`0,1,2` in profile rows)."""
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63:
        return value
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 19:
        return int(value)
    if lenient:
        return None
    raise _bad(named, f"{value!r:.60} is not a whole number")


def _partition_id(value: Any, named: str) -> int | None:
    """A partition's number; a list of all that the card has (`0,1`, `[0, 1]`) is no one's number."""
    many = isinstance(value, list) or (isinstance(value, str) and "," in value)
    return None if many else _number(value, named)


def _text(value: Any) -> str | None:
    return value.strip() or None if isinstance(value, str) else None


def _mode(value: Any, modes: tuple[Any, ...], named: str) -> Any:
    text = _text(value)
    if text is None and value is None:
        return None
    found = next((mode for mode in modes if text is not None and mode == text.rstrip("* ").upper()), None)
    if found is None:
        raise _bad(named, f"{value!r:.60} is none of {', '.join(modes)}")
    return found


def _device_id(value: Any, named: str) -> int | None:
    if value is None:
        return None
    if isinstance(value, str) and re.fullmatch(r"0x[0-9a-fA-F]{1,4}", value):
        return int(value, 16)
    raise _bad(named, f"device_id {value!r:.60} is not like 0x74a1")


def _bdf(value: Any, named: str) -> str | None:
    if value is None:
        return None
    if isinstance(value, str) and re.fullmatch(r"[0-9a-fA-F]{4,8}:[0-9a-fA-F]{2}:[0-9a-fA-F]{2}\.[0-7]", value):
        return value.lower()
    raise _bad(named, f"bdf {value!r:.60} is not a PCI address")


def _bad(named: str, problem: str) -> NodeError:
    return NodeError(f"{named}: {problem}", field=named, remedy="save the output of `amd-smi ... --json` again")


def library_rows() -> list[Row]:
    """One row per device, [] where the library is absent or refuses: then another backend answers."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            import amdsmi

            amdsmi.amdsmi_init()
        except Exception:  # noqa: BLE001  KeyError, OSError or amdsmi's own: all mean "not here"
            return []
        try:
            return [_row(amdsmi, gpu, handle) for gpu, handle in enumerate(amdsmi.amdsmi_get_processor_handles())]
        except Exception:  # noqa: BLE001  a library that stops answering halfway is no witness at all
            return []
        finally:
            _asked(amdsmi.amdsmi_shut_down)


def _row(amdsmi: Any, gpu: int, handle: Any) -> Row:
    asic = _asked(amdsmi.amdsmi_get_gpu_asic_info, handle) or {}
    kfd = _asked(amdsmi.amdsmi_get_gpu_kfd_info, handle) or {}
    ids = _asked(amdsmi.amdsmi_get_gpu_enumeration_info, handle) or {}
    vram = _asked(amdsmi.amdsmi_get_gpu_vram_usage, handle) or {}
    compute = str(_asked(amdsmi.amdsmi_get_gpu_compute_partition, handle)).upper()
    memory = str(_asked(amdsmi.amdsmi_get_gpu_memory_partition, handle)).upper()
    bdf = _asked(amdsmi.amdsmi_get_gpu_device_bdf, handle)
    device_id = asic.get("device_id")
    return Row(
        gpu=gpu,
        bdf=bdf.lower() if isinstance(bdf, str) else None,
        device_id=int(device_id, 16) if isinstance(device_id, str) and device_id.startswith("0x") else None,
        market_name=asic.get("market_name"),
        compute_units=_whole(asic.get("num_compute_units")),
        gfx=asic.get("target_graphics_version"),
        kfd_node=_whole(kfd.get("node_id")),
        partition_id=_whole(kfd.get("current_partition_id")),
        render_minor=_whole(ids.get("drm_render")),
        compute=next((mode for mode in COMPUTE_MODES if mode == compute), None),
        memory=next((mode for mode in MEMORY_MODES if mode == memory), None),
        memory_mib=_whole(vram.get("vram_total")),
    )


def _asked(call: Callable[..., Any], *arguments: Any) -> Any:
    """The answer, or None: each figure may be refused on its own (N/A on secondaries, root only …)."""
    try:
        return call(*arguments)
    except Exception:  # noqa: BLE001  amdsmi raises classes that differ by release
        return None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
