"""Numbers of a schema, as the grammar library can keep them.

It turns bounds into regular expressions over decimals, and reads a decimal of more than 15 digits inexactly.
"""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from fractions import Fraction
from typing import Any

from aim_runtime.engines.base import Json

from .unenforceable import Unenforceable, shown

BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
EXACT = 2**53 - 1  # integers up to here are exact in every JSON implementation
DIGITS = 15


def read_bound(value: Any, at: str, out: Json) -> None:
    """``value`` of one of BOUNDS at ``at`` becomes an inclusive bound in ``out``, or makes the one there tighter."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise Unenforceable(at, f"is {shown(value)}: it is a number")
    key = at.rpartition(".")[2]
    lower = key in ("minimum", "exclusiveMinimum")
    bound = _inward(Decimal(repr(value)), lower=lower, exclusive=key.startswith("exclusive"))
    if bound > EXACT if lower else bound < -EXACT:
        raise Unenforceable(at, f"is {value!r}: numbers beyond 2**53 are not generated")
    name = "minimum" if lower else "maximum"
    bounds = [Decimal(repr(out[name])), bound] if name in out else [bound]
    out[name] = _number(max(*bounds, -Decimal(EXACT)) if lower else min(*bounds, Decimal(EXACT)))


class Steps:
    """All values of ``multipleOf`` in a schema: any of them may have to hold together."""

    def __init__(self) -> None:
        self._known: set[Decimal] = set()

    def read(self, value: Any, at: str) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise Unenforceable(at, f"is {shown(value)}: it is a number above 0")
        self._known.add(Decimal(repr(value)).normalize())
        if not self._fit():
            raise Unenforceable(at, f"is {value!r}: too fine or too many different ones to be enforced")
        return value

    def _fit(self) -> bool:
        """Whether all least common multiples stay within the 32 bits that the library computes them in."""
        places = max(0, *(-int(step.as_tuple().exponent) for step in self._known))
        product = math.prod(int(step.scaleb(places)) for step in self._known)
        return places <= 6 and product < 2**32


def complete_numbers(out: Json, at: str) -> None:
    """Bounds for integers, which otherwise never end, and for steps, which the library counts from 0 upwards."""
    types = out.get("type", ())
    whole = "integer" in types and "number" not in types
    if whole:
        out.setdefault("minimum", -EXACT)
        out.setdefault("maximum", EXACT)
    if "multipleOf" in out:
        out["minimum"] = max(0, out.get("minimum", 0))
        if out.get("maximum", 0) < 0:
            raise Unenforceable(f"{at}.multipleOf", "cannot be enforced on negative numbers")
        if whole:  # integers that are multiples of 3/2 are those of 3
            out["multipleOf"] = Fraction(repr(out["multipleOf"])).numerator


def is_exact(value: float) -> bool:
    return (
        math.isfinite(value)
        and abs(value) <= EXACT
        and (isinstance(value, int) or len(Decimal(repr(value)).normalize().as_tuple().digits) <= DIGITS)
    )


def _inward(bound: Decimal, *, lower: bool, exclusive: bool) -> Decimal:
    """An inclusive bound of digits that are read exactly, which a number cannot round beyond."""
    if exclusive:
        step = min(Decimal(1), Decimal(1).scaleb(max(0, bound.adjusted() + 1) - 12))
        bound = bound + step if lower else bound - step
    elif bound == bound.to_integral_value():
        return bound
    return Context(prec=DIGITS, rounding=ROUND_CEILING if lower else ROUND_FLOOR).plus(bound)


def _number(value: Decimal) -> int | float:
    return int(value) if value == value.to_integral_value() else float(value)
