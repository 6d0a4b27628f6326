"""The family `traffic`: how much may be asked, how large, from where and when. Judged by the room `traffic/`, which no
text is needed for; here is what a rule's `options` may hold."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, NoReturn, get_args
from zoneinfo import ZoneInfo

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from aim_guardrail.detectors.base import Label
from aim_guardrail.detectors.family import Family, Options, Wanted

TrafficLabel = Literal["REQUEST_RATE", "TOKEN_RATE", "CONTEXT_LENGTH", "UPLOAD_SIZE", "GEO", "HOURS"]
LABELS: Mapping[str, Label] = {label: Label(threshold=0.5, top_score=1.0) for label in get_args(TrafficLabel)}

Per = Literal["caller", "model", "caller_model", "global"]
Span = Literal["minute", "hour", "day"]
Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
Amount = Annotated[int, Field(ge=1, le=10**12)]
DAYS: tuple[Day, ...] = get_args(Day)

#: ISO 3166-1 alpha-2, and XK (Kosovo), which databases have, too.
_CODES = """
AD AE AF AG AI AL AM AO AQ AR AS AT AU AW AX AZ BA BB BD BE BF BG BH BI BJ BL BM BN BO BQ BR BS BT BV BW BY BZ
CA CC CD CF CG CH CI CK CL CM CN CO CR CU CV CW CX CY CZ DE DJ DK DM DO DZ EC EE EG EH ER ES ET FI FJ FK FM FO
FR GA GB GD GE GF GG GH GI GL GM GN GP GQ GR GS GT GU GW GY HK HM HN HR HT HU ID IE IL IM IN IO IQ IR IS IT JE
JM JO JP KE KG KH KI KM KN KP KR KW KY KZ LA LB LC LI LK LR LS LT LU LV LY MA MC MD ME MF MG MH MK ML MM MN MO
MP MQ MR MS MT MU MV MW MX MY MZ NA NC NE NF NG NI NL NO NP NR NU NZ OM PA PE PF PG PH PK PL PM PN PR PS PT PW
PY QA RE RO RS RU RW SA SB SC SD SE SG SH SI SJ SK SL SM SN SO SR SS ST SV SX SY SZ TC TD TF TG TH TJ TK TL TM
TN TO TR TT TV TW TZ UA UG UM US UY UZ VA VC VE VG VI VN VU WF WS YE YT ZA ZM ZW XK
"""
_COUNTRIES = frozenset(_CODES.split())
_TIME = re.compile(r"([01]\d|2[0-3]):([0-5]\d)|24:00")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Rate(_Part):
    """How much of something in a minute, an hour, a day: in any so long a time, not by the clock.

    Attributes:
        per: whose requests are counted together: a caller's (its tenant's; where nobody is asked who it is, those of an
            address), all for a model, a caller's for a model, or all.
    """

    per: Per = "caller"
    minute: Amount | None = None
    hour: Amount | None = None
    day: Amount | None = None

    @model_validator(mode="after")
    def _limits(self) -> Rate:
        if not self.limits:
            raise ValueError("limits nothing: give minute, hour or day")
        return self

    @property
    def limits(self) -> dict[Span, int]:
        """Those that are given."""
        given: dict[Span, int | None] = {"minute": self.minute, "hour": self.hour, "day": self.day}
        return {span: limit for span, limit in given.items() if limit is not None}


def _listed(value: Any) -> Any:
    """One may stand for a list of one; a list as what can be hashed."""
    return tuple(value) if isinstance(value, list) else (value,) if isinstance(value, dict) else value


Rates = Annotated[tuple[Rate, ...], BeforeValidator(_listed, json_schema_input_type=Rate | tuple[Rate, ...])]


class Countries(_Part):
    """Where a request may come from, by its client's address: only `allow`, or all but `deny` (ISO 3166-1 codes).

    Attributes:
        unknown: whether an address of no known country, such as a private one, may.
    """

    allow: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()
    unknown: Literal["allow", "deny"] = "deny"

    @field_validator("allow", "deny", mode="before")
    @classmethod
    def _codes(cls, value: Any) -> Any:
        for code in value if isinstance(value, list | tuple) else ():
            if code is False:
                raise ValueError("YAML reads NO as false: put the code in quotes, 'NO'")
            if code not in _COUNTRIES:
                raise ValueError(f"unknown country {str(code)[:80]!r}: use ISO 3166-1 codes, e.g. DE, GB, US")
        return _listed(value)

    @model_validator(mode="after")
    def _one_list(self) -> Countries:
        if bool(self.allow) == bool(self.deny):
            raise ValueError("give countries under allow, or under deny: one of them")
        return self

    def permits(self, country: str | None) -> bool:
        """Whether a request from there may pass; None: nobody knows from where."""
        if country is None:
            return self.unknown == "allow"
        return country in self.allow if self.allow else country not in self.deny


class Hours(_Part):
    """When requests are served, by the clocks of a time zone.

    Attributes:
        opens, closes: `HH:MM`; a time that closes before it opens closes on the next day.
        days: on which it opens.
    """

    time_zone: str = "UTC"
    days: tuple[Day, ...] = Field(default=DAYS, min_length=1)
    opens: str = "00:00"
    closes: str = "24:00"

    @field_validator("days", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return _listed(value)

    @field_validator("time_zone")
    @classmethod
    def _known_zone(cls, value: str) -> str:
        try:
            ZoneInfo(value)
        except (OSError, ValueError, LookupError):
            raise ValueError(f"unknown time zone {value[:80]!r}: use an IANA name, e.g. Europe/Berlin") from None
        return value

    @field_validator("opens", "closes", mode="before")
    @classmethod
    def _is_a_time(cls, value: Any) -> Any:
        if not isinstance(value, str) or not _TIME.fullmatch(value):
            raise ValueError(f"{str(value)[:80]!r} is no time of day: use 'HH:MM', in quotes")
        return value

    @model_validator(mode="after")
    def _lasts(self) -> Hours:
        if self.opens in (self.closes, "24:00"):
            raise ValueError(f"opens at {self.opens} and closes at {self.closes}: it would never be open")
        return self


class TrafficOptions(Options):
    """What a rule limits.

    Attributes:
        requests, tokens: rates; one, or a list of them.
        context_tokens: the longest prompt, as estimated.
        upload_bytes: the largest body.
    """

    requests: Rates = ()
    tokens: Rates = ()
    context_tokens: Amount | None = None
    upload_bytes: Amount | None = None
    countries: Countries | None = None
    hours: Hours | None = None

    @field_validator("requests", "tokens")
    @classmethod
    def _told_apart(cls, rates: tuple[Rate, ...]) -> tuple[Rate, ...]:
        given = [(span, rate.per) for rate in rates for span in rate.limits]
        for span, per in given:
            if given.count((span, per)) > 1:
                raise ValueError(f"a {span} per {per} is limited twice: give it once")
        return rates

    @model_validator(mode="after")
    def _limits(self) -> TrafficOptions:
        if self == TrafficOptions.model_construct():
            raise ValueError(f"a traffic rule limits nothing: give some of {', '.join(TrafficOptions.model_fields)}")
        return self

    @property
    def limits(self) -> dict[TrafficLabel, str]:
        """What is not let pass, in words, by label."""
        said: dict[TrafficLabel, str] = {}
        if self.requests:
            said["REQUEST_RATE"] = f"more than {_in_words(self.requests)}"
        if self.tokens:
            said["TOKEN_RATE"] = f"more than {_in_words(self.tokens)}"
        if self.context_tokens:
            said["CONTEXT_LENGTH"] = f"more than {self.context_tokens} tokens"
        if self.upload_bytes:
            said["UPLOAD_SIZE"] = f"more than {self.upload_bytes} bytes"
        if self.countries:
            which = "all but" if self.countries.allow else "from"
            said["GEO"] = f"{which} {', '.join(self.countries.allow or self.countries.deny)}"
        if self.hours:
            hours = self.hours
            days = ", ".join(hours.days)
            said["HOURS"] = f"outside of {hours.opens} to {hours.closes} on {days} ({hours.time_zone})"
        return said


def _in_words(rates: Iterable[Rate]) -> str:
    return ", ".join(
        f"{limit} a {span} ({rate.per.replace('_', ' and ')})" for rate in rates for span, limit in rate.limits.items()
    )


def _build(_: Wanted) -> NoReturn:
    raise TypeError("traffic reads no text: it has no detector")


FAMILY = Family("traffic", "traffic", LABELS, _build, TrafficOptions)
