"""What the operator notes on InferenceServices: annotations that are none of the pods'.

KServe copies a service's annotations to its pods, and starts them anew where one changes, unless its configuration
names it. A note of what was filled in changes by itself where somebody writes out what a default was.
"""

from __future__ import annotations

_PREFIX = "status.aim.amd.com/"
#: What was filled in, as JSON; that the guardrail was put there.
DEFAULTS, GUARDRAIL = f"{_PREFIX}defaults", f"{_PREFIX}guardrail"
#: Where it is.
PLACES = tuple(_PREFIX + name for name in ("node", "card", "partition"))
#: All of them, for KServe's serviceAnnotationDisallowedList.
NOTES = (*PLACES, DEFAULTS, GUARDRAIL)
