"""Which models whoever asks may use, by the patterns of its credential. Without a caller (identity is off, an open
route, the process itself) nothing is withheld."""

from __future__ import annotations

from collections.abc import Iterable

from aim_kserve.errors import Forbidden
from aim_kserve.identity.caller import current_caller, is_nobody


def may_use(*names: str) -> bool:
    """Whether it may use what is known by these names, of which one is enough."""
    caller = current_caller()
    return caller is None or any(map(caller.may_use, names))


def tellable(names: Iterable[str]) -> str:
    """These names as an error lists what there is: none to who has not said who it is."""
    return "" if is_nobody() else ", ".join(names)


def forbidden(model: str, usable: Iterable[str] = ()) -> Forbidden:
    """The refusal, which is the same whether or not there is such a model.

    Args:
        model: as it was asked for.
        usable: names that may be used.
    """
    names = ", ".join(usable)
    rest = f"it may use: {names}" if names else "ask whoever gave it to you for a wider one"
    return Forbidden(
        f"model {model!r}: this credential may not use it; {rest}", code="model_not_permitted", param="model"
    )


def check_use(model: str, known: Iterable[str] = ()) -> None:
    """Raises Forbidden: that model may not be used; names of ``known`` only what may."""
    if not may_use(model):
        raise forbidden(model, filter(may_use, known))
