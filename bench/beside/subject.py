"""One subject in a process of its own: says that it is loaded, then the milliseconds of each text it is given."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

Judge = Callable[[str], object]


def serve(load: Callable[[], tuple[str, Judge]]) -> None:
    """``load`` gives what it looks for, in words, and what judges one text."""
    began = time.process_time()
    try:
        what, judge = load()
    except Exception as error:  # noqa: BLE001  a peer that does not load is told of, not hidden
        _say({"error": f"{type(error).__name__}: {str(error)[:300]}"})
        return
    _say({"what": what, "load_cpu_s": round(time.process_time() - began, 2)})
    for line in sys.stdin:
        cpu_ms, wall_ms = [], []
        for text in json.loads(line):
            wall, cpu = time.perf_counter(), time.process_time()
            judge(text)
            cpu_ms.append((time.process_time() - cpu) * 1e3)
            wall_ms.append((time.perf_counter() - wall) * 1e3)
        _say({"cpu_ms": cpu_ms, "wall_ms": wall_ms})


def _say(value: object) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()
