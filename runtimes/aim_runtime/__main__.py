"""``python -m aim_runtime``: serve one model, or several."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from pathlib import Path
from typing import NamedTuple

from aim_kserve.signals import end_while_starting


class _Verb(NamedTuple):
    """module: its ``main(argv)`` returns the exit code. filters: ``… | head`` may end it."""

    module: str
    what: str
    filters: bool = False


_VERBS = {
    "keys": _Verb("aim_runtime.keys", "make, list and revoke API keys", filters=True),
    "cache": _Verb("aim_runtime.cache.verbs", "fetch models once, verify them, keep them on a volume"),
    "batch": _Verb("aim_runtime.batch.command", "have a file of requests answered with what is left over"),
    "measure": _Verb("aim_runtime.measure.verb", "run load on a server, write evidence and a plot"),
    "compare": _Verb("aim_runtime.compare", "the variants of a served name side by side", filters=True),
}
_WHAT = "\n".join(
    (
        "Serve one model, or those of a file (--models), over OpenAI's API and KServe",
        "V1 and V2 (REST, gRPC). Or do one thing and end:",
        "",
        *(f"  aim-runtime {name:<8} {verb.what}" for name, verb in _VERBS.items()),
        "",
        "Each of these has --help of its own. What follows are the server's settings.",
    )
)


def main() -> None:
    """Entry point of ``aim-runtime``. Exit codes: 0 stopped, 1 cannot serve, 2 wrong settings."""
    end_while_starting()  # before anything that takes its time to be imported
    first = sys.argv[1] if len(sys.argv) > 1 else "--"
    if verb := _VERBS.get(first):
        if verb.filters:
            _as_a_filter()
        sys.exit(importlib.import_module(verb.module).main(sys.argv[2:]))
    from aim_kserve.settings import SettingsError
    from aim_runtime.settings import RuntimeSettings

    try:
        if not first.startswith("-"):
            raise SettingsError(f"{first!r} is no verb: give {', '.join(_VERBS)}, or settings (--model_dir DIR …)")
        settings = RuntimeSettings.load(sys.argv[1:], prog="aim-runtime", description=_WHAT)
    except SettingsError as error:
        sys.exit(_refuse(str(error)))
    if settings.dry_run:
        from aim_runtime.dry_run import dry_run

        _as_a_filter()
        sys.exit(dry_run(settings))
    from aim_runtime.server import run

    sys.exit(run(settings))


def _as_a_filter() -> None:
    """``… | head`` ends what prints and serves nothing like any other filter."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def _refuse(reason: str) -> int:
    """Settings are wrong, and the one that says where Kubernetes looks may be among them: its variable counts."""
    from aim_runtime.device_settings import TERMINATION_LOG
    from aim_runtime.start import say

    given = os.environ.get("AIM_TERMINATION_LOG")
    say(reason, Path(given or TERMINATION_LOG), create=bool(given))
    return 2


if __name__ == "__main__":
    main()
