"""`plan` of workloads with windows: the plan of each part of the day, and what switches between them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from aim_profile.plans.compare import plan_diff
from aim_profile.plans.day import DayPlan, WindowPlan
from aim_profile.plans.plan import Plan, dump_plan

from .output import DOES_NOT_FIT, FITS, Block, Facts, Output, print_note, show, write_out
from .picture import draw

_MOST_NAMES = 6
_KINDS = {"stopped": "stop", "placed": "start", "moved": "move", "resized": "resize", "changed": "start anew"}


def show_day(
    output: Output, day: DayPlan, blocks: Callable[[Plan], Sequence[Block]], *, svg: Path | None, out: Path | None
) -> int:
    """Print, write and draw each plan. Exit 1 where a replica has no device in any of them.

    svg, out: `plan.yaml` becomes `plan.2200-0600.yaml` and so on. blocks: one plan's tables.
    """
    written = []
    for each in day.windows:
        if svg is not None:
            write_out(draw(each.plan, f"Fleet plan {each.window} {day.time_zone}"), _named(svg, each))
        if out is not None:
            written.append(_named(out, each))
            write_out(dump_plan(each.plan, "json" if out.suffix == ".json" else "yaml"), written[-1])
    parts = [
        block
        for (before, each) in ((earlier, later) for earlier, later in day.edges())
        for block in (_switch(before, each, day), *blocks(each.plan))
    ]
    # The day's first part is the last that an edge leads to.
    size = len(parts) // len(day.windows)
    show(output, day.model_dump(mode="json"), *parts[-size:], *parts[:-size])
    if written:
        print_note(f"written: {', '.join(map(str, written))}")
        print_note(f"from one to the next: aim-profile steps {written[0]} {written[1]}")
    return FITS if all(each.plan.complete for each in day.windows) else DOES_NOT_FIT


def _named(file: Path, each: WindowPlan) -> Path:
    return file.with_name(f"{file.stem}.{each.window.replace(':', '')}{file.suffix}")


def _switch(before: WindowPlan, now: WindowPlan, day: DayPlan) -> Facts:
    """What changes when that part of the day begins, beside the part before it."""
    changes = plan_diff(before.plan, now.plan).changes
    facts = [("from", f"{before.window} {day.time_zone}")]
    for what, said in _KINDS.items():
        names = [change.subject for change in changes if change.what == what]
        more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
        facts.append((said, ", ".join(names[:_MOST_NAMES]) + more))
    modes = Counter(
        f"{change.subject.partition(' ')[0]} {change.before} → {change.after}"
        for change in changes
        if change.what == "mode"
    )
    switched = [f"{node} on {count} card{'s' * (count > 1)}" for node, count in modes.items()]
    facts.append(("switch", ", ".join(switched) or "no card"))
    return Facts(tuple(facts), title=f"From {now.window.partition('-')[0]} ({now.window} {day.time_zone})")
