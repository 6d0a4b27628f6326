"""The amdsmi library, where the image carries it: the only file that imports it.

Importing it without libamd_smi.so prints to the console and raises KeyError; its calls raise its own
exception classes, which differ by release.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

from .gpu import COMPUTE_MODES, MEMORY_MODES
from .node_rows import Row


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
