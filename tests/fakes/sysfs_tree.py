"""Writes KFD topologies and amdgpu sysfs directories as the kernel lays them out, for tests of node.py."""

from collections.abc import Mapping
from pathlib import Path

MI300X = {"device_id": 0x74A1, "gfx_target_version": 90402}


def write_kfd_node(
    nodes: Path,
    number: int,
    *,
    location_id: int = 0,
    render_minor: int = 0,
    compute_units: int = 0,
    xcds: int | None = 1,
    unique_id: int = 7,
    memory_bytes: int | None = None,
    near_cpu_node: int | None = None,
    **more: int,
) -> Path:
    """One `nodes/<n>/`: a CPU where compute_units is 0, else a GPU or partition."""
    folder = nodes / str(number)
    folder.mkdir(parents=True)
    properties = {
        "cpu_cores_count": 0 if compute_units else 96,
        "simd_count": 4 * compute_units,
        "simd_per_cu": 4 if compute_units else 0,
        "vendor_id": 4098 if compute_units else 0,
        "location_id": location_id,
        "domain": 0,
        "drm_render_minor": render_minor,
        "hive_id": 99 if compute_units else 0,
        "unique_id": unique_id,
        **({} if xcds is None else {"num_xcc": xcds}),
        **more,
    }
    properties.setdefault("device_id", 0)
    properties.setdefault("gfx_target_version", 0)
    write_values(folder / "properties", properties)
    (folder / "gpu_id").write_text(f"{4000 + number if compute_units else 0}\n")
    if memory_bytes is not None:
        write_values(folder / "mem_banks/0/properties", {"heap_type": 1, "size_in_bytes": memory_bytes, "flags": 0})
    if near_cpu_node is not None:
        write_values(folder / "io_links/0/properties", {"type": 2, "node_from": number, "node_to": near_cpu_node})
    return folder


def write_values(file: Path, values: Mapping[str, int]) -> None:
    """`key value` lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{key} {value}\n" for key, value in values.items()))


def write_sysfs_card(folder: Path, bdf: str = "0000:05:00.0", **files: str) -> Path:
    """One `<bdf>/` with the given files, each one line, as the amdgpu driver shows them."""
    card = folder / bdf
    card.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (card / name).write_text(text + "\n")
    return card


def write_mi300x_cpx(nodes: Path, cards: int = 1, xcds_per_card: int = 8) -> None:
    """Two CPUs and `cards` MI300X in CPX, a KFD node per XCD; the last partition is 16 MiB smaller."""
    for cpu in (0, 1):
        write_kfd_node(nodes, cpu)
    for card in range(cards):
        for xcd in range(xcds_per_card):
            at = card * xcds_per_card + xcd
            write_kfd_node(
                nodes,
                2 + at,
                location_id=((0x05 + 0x11 * card) << 8) + xcd,
                render_minor=128 + at,
                compute_units=38,
                unique_id=1000 + card,
                memory_bytes=(24576 - (16 if xcd == 7 else 0)) * 2**20,
                near_cpu_node=card % 2,
                **MI300X,
            )
