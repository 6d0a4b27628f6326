"""Whether it is business hours, and if not, when they begin. Pure."""

from __future__ import annotations

from datetime import date, datetime, time, timedelta
from zoneinfo import ZoneInfo

from aim_guardrail.detectors.traffic import DAYS, Hours


def opens_in_s(hours: Hours, now_s: float) -> float:
    """Seconds until it is open; 0 while it is. ``now_s``: since the epoch."""
    zone = ZoneInfo(hours.time_zone)
    today = datetime.fromtimestamp(now_s, zone).date()
    waits = []
    for ahead in range(-1, 8):  # what opened yesterday may still be open; in a week at the latest it opens again
        day = today + timedelta(days=ahead)
        if DAYS[day.weekday()] not in hours.days:
            continue
        opens = _instant(day, hours.opens, zone)
        over_night = hours.closes <= hours.opens
        closes = _instant(day + timedelta(days=over_night), hours.closes, zone)
        if opens <= now_s < closes:
            return 0.0
        if opens > now_s:
            waits.append(opens - now_s)
    return min(waits)


def _instant(day: date, clock: str, zone: ZoneInfo) -> float:
    """Seconds since the epoch at a time of a day there. A time that a clock put forward skips is the one after it."""
    hour, minute = map(int, clock.split(":"))
    whole = datetime.combine(day, time(0), tzinfo=zone)
    if hour == 24:
        return (whole + timedelta(days=1)).timestamp()
    return whole.replace(hour=hour, minute=minute).timestamp()
