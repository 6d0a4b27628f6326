"""What kind of file a mapping looks like, by the keys that only that kind has."""

from __future__ import annotations

from typing import Literal

Kind = Literal[
    "fleet file",
    "workloads file",
    "models file",
    "plan",
    "day of plans",
    "emulation file",
    "profile",
    "QoS policy",
    "evidence file",
]

#: Looked for in this order: a plan has `cards` too.
_SIGNS: dict[Kind, tuple[str, ...]] = {
    "plan": ("placements", "totals"),
    "workloads file": ("workloads",),
    "models file": ("models",),
    "QoS policy": ("classes", "limits", "tenants"),
    "evidence file": ("measurements",),
    "fleet file": ("nodes",),
    "profile": ("engine_args", "aim_id", "variant_id", "profile_version"),
    "emulation file": ("node", "gpu", "partitions"),
    "day of plans": ("windows",),
}

_SAID: dict[Kind, str] = {"emulation file": "version: 1 and node: …, gpu: … or kind: cpu"}
_ARTICLED: dict[Kind, str] = {"emulation file": "an emulation file", "evidence file": "an evidence file"}


def looks_like(raw: object) -> Kind | None:
    """The kind it has the keys of, None where it has no kind's."""
    if not isinstance(raw, dict):
        return None
    return next((kind for kind, signs in _SIGNS.items() if any(sign in raw for sign in signs)), None)


def described(kind: Kind) -> str:
    """`a fleet file (nodes: …)`, for people."""
    return f"{_ARTICLED.get(kind, f'a {kind}')} ({_SAID.get(kind, _SIGNS[kind][0] + ': …')})"
