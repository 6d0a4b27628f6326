"""From a policy's rates to what one request is charged: whose counts, by names that tell nobody who it is. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from ipaddress import IPv6Address, ip_network
from typing import Literal, NamedTuple

from aim_guardrail.detectors.traffic import Per, Rate, Span, TrafficOptions
from aim_guardrail.pipeline.context import RequestContext
from aim_guardrail.policy import Rule
from aim_guardrail.traffic.windows import WINDOWS, Charge
from aim_kserve.client_address import address_of

Unit = Literal["requests", "tokens"]
LABEL_OF: dict[Unit, str] = {"requests": "REQUEST_RATE", "tokens": "TOKEN_RATE"}
_OTHERS = "\1others"  # no caller is called that


class Limit(NamedTuple):
    """One limit of one rule: so many of a unit in a span of time, counted per whom."""

    rule: Rule
    unit: Unit
    span: Span
    per: Per
    amount: int

    @property
    def label(self) -> str:
        return LABEL_OF[self.unit]

    @property
    def name(self) -> str:
        """What metrics call it: ``requests_minute``."""
        return f"{self.unit}_{self.span}"

    @property
    def needs_model(self) -> bool:
        """Whether it is counted by models, which a body may have to name."""
        return self.per in ("model", "caller_model")

    def charge(self, service: str, caller: str, model: str, cost: int) -> Charge:
        """Of a caller's request for a model. ``service``: whose limits these are."""
        whose = {"caller": (caller, ""), "model": ("", model), "caller_model": (caller, model), "global": ("", "")}
        others = (_OTHERS if self.per != "model" else "", _OTHERS if self.needs_model else "")
        return Charge(
            self._key(service, whose[self.per]), self._key(service, others), self.amount, cost, WINDOWS[self.span]
        )

    def _key(self, service: str, whose: tuple[str, str]) -> str:
        text = "\0".join((service, self.rule.name, self.unit, self.span, self.per, *whose))
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def limits_of(rules: Sequence[Rule]) -> Iterator[Limit]:
    """Every limit of requests or tokens that the rules set."""
    for rule in rules:
        options = options_of(rule)
        rates: tuple[tuple[Unit, tuple[Rate, ...]], ...] = (("requests", options.requests), ("tokens", options.tokens))
        for unit, each in rates:
            yield from (Limit(rule, unit, span, r.per, n) for r in each for span, n in r.limits.items())


def options_of(rule: Rule) -> TrafficOptions:
    """A traffic rule's."""
    assert isinstance(rule.options, TrafficOptions)
    return rule.options


def caller_of(context: RequestContext) -> str:
    """Who is counted together: a tenant or, where nobody is asked who it is, an address. Of IPv6 it is the network of
    64 bits: whoever has one has them all."""
    if context.caller is not None:
        return f"tenant {context.caller.tenant}"
    address = address_of(context.client or "")
    if isinstance(address, IPv6Address):
        return f"network {ip_network((address, 64), strict=False)}"
    return f"address {address}"
