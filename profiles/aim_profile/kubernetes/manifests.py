"""The folder `manifests/`, whole: runtimes, claims, overlays and samples as files, from the catalogue and the renderer.

Nothing in it is written by hand: `write` makes it, `drift` says what is not as it would be made.
"""

from __future__ import annotations

from pathlib import Path

from .charts import charts
from .generated import Generated
from .gpu_operator import device_configs
from .overlays import overlays
from .runtimes import base, claims, partitions
from .samples import samples, tenants

# Folders of manifests/ that others make.
_ELSEWHERE = frozenset({"crds", "operator", "monitoring", "training"})


def manifests() -> dict[str, str]:
    """Every file of the folder: path below it → text."""
    return {
        **base(),
        **partitions(),
        **claims(),
        **device_configs(),
        **overlays(),
        **tenants(),
        **charts(),
        **samples(),
    }


def write(folder: Path) -> list[str]:
    """Makes the folder anew. Returns what `drift` said before. Raises RenderError as `Generated.write` does."""
    return generated().write(folder)


def drift(folder: Path) -> list[str]:
    """What is not as it is made; what others make is passed over."""
    return generated().drift(folder)


def generated() -> Generated:
    """The folder but for what others make of it."""
    return Generated(manifests(), _ELSEWHERE)
