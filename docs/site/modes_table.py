"""The table of partition modes in docs/compatibility.md, out of the catalogue."""

from __future__ import annotations

from collections.abc import Iterator

from aim_profile.gpus.catalog import DEPLOYMENTS, Accelerator, Deployment, PartitionMode, catalog


def table() -> str:
    """A row for each product and deployment with a mode that AMD validates or the driver accepts; its sources below."""
    sources: dict[str, int] = {}
    rows = [row for _, gpu in sorted(catalog().items()) for row in _rows(gpu, sources)]
    head = "| GPU | deployment | validated by AMD | legal for the driver |\n|---|---|---|---|\n"
    told = "".join(f"{number}. {source}\n" for source, number in sources.items())
    return f"{head}{''.join(rows)}\nSources:\n\n{told}"


def _rows(gpu: Accelerator, sources: dict[str, int]) -> Iterator[str]:
    for deployment in DEPLOYMENTS:
        cells = [_cell(gpu, deployment, tier, sources) for tier in ("validated", "driver-legal")]
        if any(cells):
            yield f"| {gpu.name} | {deployment} | {' | '.join(cell or 'none' for cell in cells)} |\n"


def _cell(gpu: Accelerator, deployment: Deployment, tier: str, sources: dict[str, int]) -> str:
    modes = [mode for mode in gpu.modes(deployment) if mode.tier == tier]
    return ", ".join(f"{mode.label} [{_number(mode, sources)}]" for mode in modes)


def _number(mode: PartitionMode, sources: dict[str, int]) -> int:
    return sources.setdefault(mode.source, len(sources) + 1)
